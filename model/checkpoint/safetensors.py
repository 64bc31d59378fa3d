"""Safetensors files, one or many behind an index: headers checked before anything large is read, then data by slice.

A file is: 8 bytes, little-endian length of the header; the header, JSON {name: {dtype, shape, data_offsets}}; the data,
tensors one after the other without holes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open
from torch import Tensor

from corral.model.checkpoint.json_file import parse_json, read_json
from corral.model.checkpoint.names import is_dropped
from corral.model.checkpoint.store import TensorInfo, listed
from corral.spec.errors import InputError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the format's own limit

# Safetensors dtype -> (our name for it, bits).
DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0", 8),
    "F6_E2M3": ("float6_e2m3", 6), "F6_E3M2": ("float6_e3m2", 6), "F4": ("float4_e2m1", 4),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8),
    "BOOL": ("bool", 8), "C64": ("complex64", 64),
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsStore:
    """The tensors of a directory of safetensors files."""

    tensors: Mapping[str, TensorInfo]

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """`tensor[where]`; the file is mapped, so only the pages of that slice are read."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_slice(name)[where or ...]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: tensor {name} cannot be read: {error}. Download the file again.") from None


def can_open_safetensors(directory: Path) -> bool:
    """Whether the directory holds safetensors files, or an index of some."""
    return (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors"))


def open_safetensors(directory: Path) -> SafetensorsStore:
    """Read and check all headers. Raises InputError for a malformed or truncated file, and for missing shards.

    Where both are there `model.safetensors` wins over the index, as in transformers; without either, all files count.
    """
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():
        return SafetensorsStore(read_header(single))
    if index.is_file():
        return SafetensorsStore(_read_indexed(directory, index))
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(directory.glob("*.safetensors")):
        header = read_header(file)
        if twice := sorted(header.keys() & tensors.keys()):
            raise InputError(
                f"{directory} has no {INDEX_NAME}, and {listed(twice)} is in both {file.name} and "
                f"{tensors[twice[0]].file.name}; keep the files of one checkpoint only."
            )
        tensors |= header
    return SafetensorsStore(tensors)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it. Raises InputError where it is damaged or names a file outside."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to file names: it is damaged.")
    for shard in sorted(set(weight_map.values())):
        path = PurePosixPath(shard)
        if not shard or path.is_absolute() or ".." in path.parts or "\\" in shard or "\0" in shard:
            raise InputError(f"{index} names the file {shard!r}, which is outside the checkpoint; it is not opened.")
    return weight_map


def join_headers(
    index: Path, weight_map: Mapping[str, str], headers: Mapping[str, dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all files whose headers are given, held against the index."""
    placed = {name: shard for name, shard in weight_map.items() if shard in headers}
    if absent := [name for name, shard in placed.items() if name not in headers[shard]]:
        raise InputError(
            f"{index} places {listed([f'{name} in {placed[name]}' for name in absent])}, but that is not there: "
            "index and files are not of one checkpoint."
        )
    # A tensor the index forgets still counts, so that it is either used or reported as unknown; the index has the last
    # word on which shard is meant.
    every = {name: info for header in headers.values() for name, info in header.items()}
    return every | {name: headers[shard][name] for name, shard in placed.items()}


def _read_indexed(directory: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    # A file of nothing but what is never read need not be there: it was not downloaded.
    needed = {shard for name, shard in weight_map.items() if not is_dropped(name)}
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if missing := [shard for shard in absent if shard in needed]:
        raise InputError(
            f"{directory} lacks {len(missing)} of the {len(shards)} files that {INDEX_NAME} names: {listed(missing)}. "
            "Download the checkpoint again."
        )
    headers = {shard: read_header(directory / shard) for shard in shards if shard not in absent}
    return join_headers(index, weight_map, headers)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Trusts nothing: neither length, offsets, shapes nor types. Raises InputError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:

            def read(begin: int, end: int) -> bytes:
                opened.seek(begin)
                return opened.read(end - begin)

            return parse_header(read, size, file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None


def parse_header(read: Callable[[int, int], bytes], size: int, file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes, of which `read(begin, end)` gives some; `file` names it."""
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if size < 8 or length > size - 8 or length > HEADER_BYTES:
        raise InputError(
            f"{file} has {size} bytes and claims a header of {length}; expected at most "
            f"{min(HEADER_BYTES, max(size - 8, 0))}. It is truncated or no safetensors file."
        )
    header = parse_json(read(8, 8 + length), f"the header of {file}")
    header.pop("__metadata__", None)
    places = {name: _read_place(name, place, file) for name, place in header.items()}
    _check_offsets({name: offsets for name, (_, offsets) in places.items()}, size - 8 - length, file)
    # Hub caches hold links to blobs; loaders further on refuse links, so the file itself is named.
    real = file.resolve()
    return {name: dataclasses.replace(info, file=real) for name, (info, _) in places.items()}


def _read_place(name: str, place: Any, file: Path) -> tuple[TensorInfo, tuple[int, int]]:
    """One entry of the header, its types checked, and its offsets against shape and dtype."""
    where = f'{file}: tensor "{name[:200]}"'
    if not isinstance(place, dict):
        raise InputError(f"{where} is described by {str(place)[:80]}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = (place.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has dtype {str(dtype)[:80]}, expected one of {', '.join(DTYPES)}.")
    if not _are_counts(shape):
        raise InputError(f"{where} has shape {str(shape)[:80]}, expected a list of whole numbers.")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where} has data_offsets {str(offsets)[:80]}, expected [begin, end] with begin <= end.")
    our_dtype, bits = DTYPES[dtype]
    expected_bits = math.prod(shape) * bits
    if (offsets[1] - offsets[0]) * 8 != expected_bits:
        raise InputError(
            f"{where} has {offsets[1] - offsets[0]} bytes, but {dtype} {shape} needs {-(-expected_bits // 8)}: "
            "it is damaged."
        )
    return TensorInfo(name, file, our_dtype, tuple(shape)), (offsets[0], offsets[1])


def _check_offsets(places: dict[str, tuple[int, int]], data_bytes: int, file: Path) -> None:
    """Tensors fill the data without overlap and without holes."""
    stop = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != stop:
            what = "overlaps the tensor before it" if begin < stop else "leaves a hole before it"
            raise InputError(f'{file}: tensor "{name}" begins at byte {begin}, expected {stop}: it {what}.')
        stop = end
    if stop > data_bytes:
        raise InputError(f"{file} is truncated: {data_bytes} bytes of data, expected {stop}. Download it again.")
    if stop < data_bytes:
        raise InputError(f"{file} has {data_bytes} bytes of data, but its tensors only {stop}: it is damaged.")


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a short list of whole numbers of at most 63 bits, bool not being one."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
