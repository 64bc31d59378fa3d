"""The token embedding: rows gathered from a memory map of the bundle's table, so it costs no memory of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.session import Float32
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.manifest import TensorRecord

# numpy has no bfloat16: its bits are the upper half of a float32's.
STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
}
CODES = "uint8"  # of a quantized table


class EmbeddingTable:
    """`table(ids)` -> float32 rows [len(ids), hidden]."""

    def __init__(self, bundle: Bundle) -> None:
        record, model = bundle.manifest.embedding, bundle.manifest.model
        if record is None:
            raise InputError(
                f"{bundle.directory} has no embedding table: it is an unfinished compile. Compile it again."
            )
        self._dtype, self._hidden = record.dtype, model.hidden_size
        widths = {model.hidden_size, model.hidden_size // 2} if record.dtype == CODES else {model.hidden_size}
        self._table = _open(bundle, record, model.vocab_size, widths)
        self._scales: NDArray[Any] | None = None
        if record.dtype == CODES:
            scales = bundle.manifest.embedding_scales
            if scales is None or scales.dtype != "float32":
                raise InputError(f"{record.path}: a table of codes has float32 scales, and the manifest names none.")
            divisors = {n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0}
            self._scales = _open(bundle, scales, model.vocab_size, divisors)

    def __call__(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Float32:
        ids = np.asarray(token_ids, dtype=np.int64)
        rows = self._table.take(ids, axis=0)  # a tenth of the time of indexing, for a single row
        if self._scales is not None:
            return self._dequantized(rows, self._scales.take(ids, axis=0))
        if self._dtype == "bfloat16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    def _dequantized(self, rows: NDArray[np.uint8], scales: NDArray[np.float32]) -> Float32:
        bits = 8 * rows.shape[1] // self._hidden
        if bits == 4:  # in pairs, the first in the low nibble
            rows = np.stack([rows & 15, rows >> 4], axis=-1)
        codes = rows.reshape(len(rows), scales.shape[1], -1).astype(np.float32) - np.float32(1 << (bits - 1))
        return (codes * scales[:, :, None]).reshape(len(rows), self._hidden)


def _open(bundle: Bundle, record: TensorRecord, rows: int, widths: Collection[int]) -> NDArray[Any]:
    """A memory map of [rows, one of `widths`]. Raises InputError for another dtype or shape, and a file that is too short."""
    if record.dtype not in STORED:
        raise InputError(f"{record.path}: embedding dtype is {record.dtype!r}, expected one of {', '.join(STORED)}.")
    if len(record.shape) != 2 or record.shape[0] != rows or record.shape[1] not in widths:
        wanted = " or ".join(str((rows, width)) for width in sorted(widths, reverse=True)[:2])
        raise InputError(f"{record.path}: embedding shape is {record.shape}, expected {wanted} (vocab, hidden).")
    path, dtype = bundle.path(record.path), STORED[record.dtype]
    needed = record.offset + int(np.prod(record.shape)) * dtype.itemsize
    if path.stat().st_size < needed:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, but the embedding table ends at {needed}. Compile it again."
        )
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=record.offset, shape=record.shape)
    return mapped.view(np.ndarray)  # whose indexing is faster
