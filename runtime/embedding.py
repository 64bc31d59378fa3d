"""The token embedding: rows gathered from a memory map of the bundle's table, so it costs no memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.session import Float32
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError

# numpy has no bfloat16: its bits are the upper half of a float32's.
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


class EmbeddingTable:
    """`table(ids)` -> float32 rows [len(ids), hidden]."""

    def __init__(self, bundle: Bundle) -> None:
        record, model = bundle.manifest.embedding, bundle.manifest.model
        if record is None:
            raise InputError(
                f"{bundle.directory} has no embedding table: it is an unfinished compile. Compile it again."
            )
        if record.dtype not in STORED:
            raise InputError(
                f"{record.path}: embedding dtype is {record.dtype!r}, expected one of {', '.join(STORED)}."
            )
        expected = (model.vocab_size, model.hidden_size)
        if record.shape != expected:
            raise InputError(f"{record.path}: embedding shape is {record.shape}, expected {expected} (vocab, hidden).")
        path, dtype = bundle.path(record.path), STORED[record.dtype]
        needed = record.offset + int(np.prod(record.shape)) * dtype.itemsize
        if path.stat().st_size < needed:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, but the embedding table ends at {needed}. Compile it again."
            )
        self._bfloat16 = record.dtype == "bfloat16"
        self._table = np.memmap(path, dtype=dtype, mode="r", offset=record.offset, shape=record.shape)

    def __call__(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Float32:
        rows = np.asarray(self._table[np.asarray(token_ids, dtype=np.int64)])
        if self._bfloat16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)
