"""The weights of an ONNX file, handed to TensorRT's parser as addresses in the mapped shards: no copy, few resident pages.

The parser can read external data itself, and maps it, too; but the pages that it has read stay resident beside what the
builder makes of them. Here they are given back all the time: they are the file's own, so reading one again costs little.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

GIVE_BACK_EVERY = 0.05  # seconds; a builder reads some hundred MB meanwhile


class MappedWeights:
    """An ONNX file without its weights, and its weights where they lie. Must live as long as the network made of it.

    Raises ValueError where the graph names bytes that a shard does not have.
    """

    def __init__(self, graph: Path) -> None:
        import onnx

        model = onnx.load(graph, load_external_data=False)
        self.graph: bytes = model.SerializeToString()
        self._maps: dict[str, mmap.mmap] = {}
        self._weights: list[tuple[str, str, int, int]] = []
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                shard, start, size = place["location"], int(place.get("offset", 0)), int(place["length"])
                if shard not in self._maps:
                    with (graph.parent / shard).open("rb") as file:
                        self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if start + size > len(self._maps[shard]):
                    raise ValueError(f"{shard} ends before {tensor.name}")
                self._weights.append((tensor.name, shard, start, size))

    def parse(self, parser: Any) -> bool:
        """Parse the graph with an OnnxParser; False where that refuses it, and then says why."""
        start = {shard: np.frombuffer(pages, np.uint8).ctypes.data for shard, pages in self._maps.items()}
        return (
            parser.load_model_proto(self.graph)
            and all(parser.load_initializer(name, start[shard] + at, size) for name, shard, at, size in self._weights)
            and parser.parse_model_proto()
        )

    def give_back(self) -> None:
        """Give the pages that were read back to the system."""
        for pages in self._maps.values():
            pages.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def giving_back(self) -> Iterator[None]:
        """While the block runs, give pages back again and again."""
        done = threading.Event()

        def repeat() -> None:
            while not done.wait(GIVE_BACK_EVERY):
                self.give_back()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
