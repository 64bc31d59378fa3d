"""Files of `torch.save`: which tensors they hold and where the bytes lie. Runs nothing of the file and reads no weight.

Since PyTorch 1.6 such a file is a zip archive of uncompressed records: `data.pkl`, a pickle that describes the tensors,
and one record of raw numbers for each storage (`torch.serialization`). A pickle is a program. Its imports are listed
first, and one that is not on PyTorch's list of harmless ones is refused before anything of it is carried out; then
`torch.load` reads it with `weights_only` onto the "meta" device, where tensors have a place in the file and no values.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corral.spec.errors import InputError

PICKLE_BYTES = 64 << 20  # the largest description that is read; that of a shard of Maverick has less than one
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and extra field (APPNOTE.TXT 4.3.7)
# Transformer Engine leaves its state in the published files as io.BytesIO, which holds bytes and does nothing.
HARMLESS: list[Any] = [io.BytesIO]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: `file`, byte `offset` of its first number, dtype ("bfloat16", …), shape, strides in numbers."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def rows(self, start: int, stop: int) -> StoredTensor:
        """The rows from `start` to `stop`."""
        offset = self.offset + start * self.strides[0] * _itemsize(self.dtype)
        return StoredTensor(self.file, offset, self.dtype, (stop - start, *self.shape[1:]), self.strides)

    def unflatten(self, first: int) -> StoredTensor:
        """[first * n, columns] as [first, n, columns]."""
        rows = self.shape[0] // first
        strides = (rows * self.strides[0], *self.strides)
        return StoredTensor(self.file, self.offset, self.dtype, (first, rows, *self.shape[1:]), strides)

    def transpose(self) -> StoredTensor:
        """[rows, columns] as [columns, rows]."""
        return StoredTensor(self.file, self.offset, self.dtype, self.shape[::-1], self.strides[::-1])

    def map(self) -> Tensor:
        """The values; they alias the mapped file, so that only what is touched is read."""
        dtype = getattr(torch, self.dtype)
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=dtype)
        size = _span(self.shape, self.strides) * _itemsize(self.dtype)
        try:
            # "c", copy on write: torch warns of memory that it may not write to.
            raw = np.memmap(self.file, np.uint8, mode="c", offset=self.offset, shape=(size,))
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise InputError(f"{self.file} cannot be read: {error}. Was it changed?") from None
        return torch.from_numpy(raw).view(dtype).as_strided(self.shape, self.strides)


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a `torch.save` of a dict holds; other values of it are left out.

    Raises InputError where the file is unreadable, truncated, of the old format, holds code, or contradicts itself.
    """
    file = file.resolve()
    try:
        records = _records(file)
        return {name: _place(name, tensor, records, file) for name, tensor in _load(file).items()}
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None


def _records(file: Path) -> dict[int, int]:
    """Where each record's data begins -> its length. Raises InputError for what is no `torch.save` archive."""
    with file.open("rb") as opened:
        start = opened.read(2)
        if not zipfile.is_zipfile(opened):
            raise InputError(f"{file} {_no_archive(start)}")
        try:
            archive = zipfile.ZipFile(opened)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise InputError(f"{file} is a damaged zip archive: {error}. Download it again.") from None
        places = {}
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{file}: {record.filename[:80]} is compressed; torch.save compresses nothing.")
            if record.filename.endswith("/data.pkl") and record.file_size > PICKLE_BYTES:
                raise InputError(f"{file} describes its tensors in {record.file_size} bytes, expected {PICKLE_BYTES}.")
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise InputError(f"{file} was written by a big-endian machine; corral reads little-endian files.")
            opened.seek(record.header_offset)
            header = opened.read(LOCAL_HEADER_BYTES)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            places[record.header_offset + LOCAL_HEADER_BYTES + names] = record.file_size
    return places


def _no_archive(start: bytes) -> str:
    if start == b"PK":
        return "is truncated: the directory at the end of the zip archive is missing. Download it again."
    if start[:1] == b"\x80":
        return (
            "is a bare pickle, as torch.save wrote before PyTorch 1.6; corral reads the zip format only. Load it with "
            "a PyTorch you trust it to and save it again."
        )
    return "is not a file of torch.save: it is no zip archive."


def _load(file: Path) -> dict[str, Tensor]:
    """Tensors without values. Nothing is carried out of a pickle that imports what it should not."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if imports := torch.serialization.get_unsafe_globals_in_checkpoint(file):
                raise InputError(
                    f"{file} holds code: it would load {', '.join(sorted(imports))[:200]}, which no weights need. "
                    "Nothing of it was run. Do not use this file; download the checkpoint from its makers."
                )
            loaded = torch.load(file, map_location="meta", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        said = [line for line in str(error).splitlines() if line.startswith(("Trying", "Unsupported"))]
        why = said[0][:200] if said else "it is damaged, or of another kind than torch.save writes."
        raise InputError(f"{file} is a pickle that holds more than tensors: {why}") from None
    except Exception as error:  # a damaged pickle fails in any way; it has no effect besides
        said = (str(error).splitlines() or [type(error).__name__])[:1]
        raise InputError(f"{file} is damaged: {said[0][:200]}. Download it again.") from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise InputError(f"{file} holds a {type(loaded).__name__}, expected a dict of tensors by name.")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _place(name: str, tensor: Tensor, records: dict[int, int], file: Path) -> StoredTensor:
    """Hold what the pickle says of a tensor against the archive's records."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    where = f'{file}: tensor "{name[:200]}"'
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise InputError(f"{where} is {tensor.layout}, expected plain numbers.")
    storage, start = tensor.untyped_storage(), int(tensor.storage_offset())
    begin, shape, strides = getattr(storage, "_checkpoint_offset", -1), tuple(tensor.shape), tuple(tensor.stride())
    size = (start + _span(shape, strides)) * tensor.itemsize
    if records.get(begin) != storage.nbytes() or size > storage.nbytes():
        raise InputError(
            f"{where} of {dtype} {list(shape)} is said to have {storage.nbytes()} bytes at byte {begin}, but the archive "
            f"has a record of {records.get(begin, 0)} bytes there: it is damaged."
        )
    return StoredTensor(file, begin + start * tensor.itemsize, dtype, shape, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Numbers from the first to the last, both counted."""
    if not math.prod(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
