"""Weights of a graph handed to TensorRT's parser where they lie in the shards."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from corral.graphs.engine.mapped_weights import MappedWeights

ROWS, COLUMNS = 64, 1 << 16  # 16 MiB of float32: far more than what else changes in a process meanwhile


class Parser:
    """What is seen of TensorRT's OnnxParser: copies each weight that it is given the address of."""

    def __init__(self, refuses: str = "") -> None:
        self.given: dict[str, bytes] = {}
        self.model = b""
        self.refuses = refuses

    def load_model_proto(self, model: bytes) -> bool:
        self.model = model
        return True

    def load_initializer(self, name: str, address: int, size: int) -> bool:
        self.given[name] = ctypes.string_at(address, size)
        return name != self.refuses

    def parse_model_proto(self) -> bool:
        return True


def saved(directory: Path) -> dict[str, Any]:
    """A graph whose two matrices lie behind each other in one shard; a third is small and stays in the graph."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((ROWS, COLUMNS), np.float32) for name in "ab"} | {"c": np.ones(1, np.float32)}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    onnx.save(
        onnx.helper.make_model(graph),
        directory / "g.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=1024,
    )
    return arrays


def resident_file_pages() -> int:
    found = re.search(r"^RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


def test_the_parser_sees_each_weight_of_the_shards_and_none_is_in_the_graph(tmp_path: Path) -> None:
    arrays, parser = saved(tmp_path), Parser()
    assert MappedWeights(tmp_path / "g.onnx").parse(parser)
    assert parser.given == {name: arrays[name].tobytes() for name in "ab"}
    assert len(parser.model) < 1024


def test_a_weight_that_the_parser_refuses_ends_the_parsing(tmp_path: Path) -> None:
    saved(tmp_path)
    assert not MappedWeights(tmp_path / "g.onnx").parse(Parser(refuses="a"))


def test_pages_that_were_read_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    arrays, parser = saved(tmp_path), Parser()
    weights = MappedWeights(tmp_path / "g.onnx")
    before = resident_file_pages()
    weights.parse(parser)
    size = sum(arrays[name].nbytes for name in "ab")
    assert resident_file_pages() - before > 0.9 * size
    weights.give_back()
    assert resident_file_pages() - before < 0.1 * size
    weights.parse(parser)
    assert parser.given["b"] == arrays["b"].tobytes()


def test_a_shard_that_is_too_short_is_named_before_anything_reads_beyond_its_end(tmp_path: Path) -> None:
    saved(tmp_path)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(ROWS * COLUMNS * 4 + 100)
    with pytest.raises(ValueError, match=r"weights\.bin ends before b"):
        MappedWeights(tmp_path / "g.onnx")
