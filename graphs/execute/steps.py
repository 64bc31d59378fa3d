"""The functions that plan entries name: pure, from numpy arrays to numpy arrays. A table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.fp8 import fp8
from corral.graphs.quantize.pack import interleave_halves, pack_columns, pack_rows
from corral.graphs.quantize.rtn import rtn
from corral.spec.errors import InputError

NUMPY_TYPE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
}


def rows(array: NDArray[np.generic], *, dtype: str) -> NDArray[np.generic]:
    """Store as it is, in `dtype`. Raises InputError for a number that `dtype` does not have."""
    return _cast(array, dtype)


def columns(array: NDArray[np.generic], *, dtype: str) -> NDArray[np.generic]:
    """Store transposed, in `dtype`: [outputs, inputs] -> [inputs, outputs]. Raises InputError as `rows` does."""
    return np.ascontiguousarray(_cast(array, dtype).T)


def _cast(array: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        stored: NDArray[np.generic] = array.astype(NUMPY_TYPE[dtype], copy=False)
    if dtype == "float16" and not np.isfinite(stored).all():
        raise InputError(
            f"holds numbers up to {np.abs(array).max():.3g}; float16 ends at 65504. "
            "Compile for a target that stores this weight in float32."
        )
    return stored


STEPS: dict[str, Callable[..., Any]] = {
    "rows": rows,
    "columns": columns,
    "rtn": rtn,
    "fp8": fp8,
    "pack_rows": pack_rows,
    "pack_columns": pack_columns,
    "interleave_halves": interleave_halves,
}
