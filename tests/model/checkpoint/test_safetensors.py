"""Hostile and damaged safetensors files are refused with a reason before anything large is read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from corral.model.checkpoint.safetensors import INDEX_NAME, open_safetensors, read_header
from corral.spec.errors import InputError

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def write(file: Path, header: bytes | dict[str, Any], data_bytes: int = 32, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data_bytes))
    return file


def test_a_good_file(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x", {"__metadata__": {"format": "pt"}, "b": B, "a": A}))
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "b": ("bfloat16", (4,)),
        "a": ("float32", (2, 3)),
    }


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 1000])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match=rf"claims a header of {length}; expected at most \d+\. It is truncated"):
        read_header(write(tmp_path / "x", {"a": A}, length=length))


def test_a_header_beyond_the_formats_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "x", b"", length=200_000_000)
    with file.open("r+b") as opened:
        opened.truncate(1 << 30)  # sparse
    with pytest.raises(InputError, match="expected at most 100000000"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"has {size} bytes"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"hello", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', "not readable JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": 1, "a": 2}', 'has the key "a" twice'),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 'has the key "dtype" twice'),
        ({"a": 3}, "described by 3, expected dtype, shape and data_offsets"),
        ({"a": {**A, "dtype": "F128"}}, "has dtype F128, expected one of F64, F32"),
        ({"a": {**A, "dtype": ["F32"]}}, "has dtype"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "data_offsets None"),
        ({"a": {**A, "shape": [-2, -3]}}, "expected a list of whole numbers"),
        ({"a": {**A, "shape": [True, 6]}}, "expected a list of whole numbers"),
        ({"a": {**A, "shape": [1 << 70]}}, "expected a list of whole numbers"),
        ({"a": {**A, "shape": "23"}}, "expected a list of whole numbers"),
        ({"a": {**A, "data_offsets": [24, 0]}}, "begin <= end"),
        ({"a": {**A, "data_offsets": [-24, 0]}}, "begin <= end"),
        ({"a": {**A, "data_offsets": [0, 24, 48]}}, "begin <= end"),
        ({"a": {**A, "shape": [2, 4]}}, r"has 24 bytes, but F32 \[2, 4\] needs 32"),
        ({"a": {**A, "shape": [1 << 60, 1 << 60]}}, "needs 5316911983139663491615228241121378304"),
        ({"a": {**A, "data_offsets": [8, 32]}}, "leaves a hole before it"),
        ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, "overlaps the tensor before it"),
        ({"a": A, "b": {**B, "data_offsets": [0, 8]}}, "overlaps the tensor before it"),
        ({"a": A, "b": B, "c": {"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}}, "truncated: 32 bytes of data"),
        ({"a": A}, "has 32 bytes of data, but its tensors only 24"),
    ],
)  # fmt: skip
def test_a_malformed_header(tmp_path: Path, header: bytes | dict[str, Any], reason: str) -> None:
    file = write(tmp_path / "x.safetensors", header)
    with pytest.raises(InputError, match=reason) as error:
        read_header(file)
    assert str(file) in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", ""]),
        json_values | st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values}),
    )
)
def test_any_header_opens_or_is_refused(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    file = write(tmp_path_factory.getbasetemp() / "any.safetensors", header)
    with contextlib.suppress(InputError):
        read_header(file)


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "", "a\0b"])
def test_an_index_may_not_lead_outside(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(InputError, match="which is outside the checkpoint"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, "x"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(InputError, match="has no weight_map"):
        open_safetensors(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(InputError, match=r"places b in 1\.safetensors, c in 2\.safetensors, but that is not there"):
        open_safetensors(tmp_path)


def test_the_index_decides_between_shards_and_forgets_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "c": torch.zeros(4)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "c": "2.safetensors"})
    store = open_safetensors(tmp_path)
    assert store.tensors.keys() == {"a", "b", "c"}
    assert torch.equal(store.read_slice("a", ()), torch.zeros(2))


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        open_safetensors(tmp_path)
