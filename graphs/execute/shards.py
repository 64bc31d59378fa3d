"""Weight shards being written: bytes land at their offsets in temporary files, which are renamed when complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from corral.spec.weight_plan import Placement

PARTIAL = ".partial"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"weights-{shard:05d}.bin"


def shard_sizes(placements: Mapping[str, Placement]) -> dict[int, int]:
    """Bytes of each shard."""
    sizes: dict[int, int] = {}
    for place in placements.values():
        sizes[place.shard] = max(sizes.get(place.shard, 0), place.offset + place.nbytes)
    return sizes


class ShardWriter:
    """Open shards of a plan in `directory`. `finish` syncs and renames them; leaving without it leaves them partial."""

    def __init__(self, directory: Path, placements: Mapping[str, Placement]) -> None:
        self.directory = directory
        self.sizes = shard_sizes(placements)
        self.files: dict[int, int] = {}

    def __enter__(self) -> ShardWriter:
        for shard, size in self.sizes.items():
            path = self.directory / (shard_name(shard) + PARTIAL)
            self.files[shard] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.ftruncate(self.files[shard], size)
        return self

    def write(self, shard: int, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.files[shard], view, offset)
            view, offset = view[written:], offset + written

    def finish(self) -> list[str]:
        """Make the shards durable under their own names, and return those."""
        for shard, file in self.files.items():
            os.fsync(file)
            path = self.directory / shard_name(shard)
            os.replace(path.with_name(path.name + PARTIAL), path)
        return [shard_name(shard) for shard in self.files]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            os.close(file)
        self.files.clear()
