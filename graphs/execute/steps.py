"""The functions that plan entries name: pure, from numpy arrays to numpy arrays. A table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.awq import awq, rescale
from corral.graphs.quantize.gptq import gptq
from corral.graphs.quantize.hqq import hqq
from corral.graphs.quantize.pack import interleave_halves, pack_columns, pack_rows
from corral.graphs.quantize.rtn import rtn
from corral.graphs.quantize.rtn_mse import rtn_mse

NUMPY_TYPE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def rows(array: NDArray[np.generic], *, dtype: str) -> NDArray[np.generic]:
    """Store as it is, in `dtype`."""
    return array.astype(NUMPY_TYPE[dtype], copy=False)


def columns(array: NDArray[np.generic], *, dtype: str) -> NDArray[np.generic]:
    """Store transposed, in `dtype`: [outputs, inputs] -> [inputs, outputs]."""
    return np.ascontiguousarray(array.T, dtype=NUMPY_TYPE[dtype])


STEPS: dict[str, Callable[..., Any]] = {
    "rows": rows,
    "columns": columns,
    "rtn": rtn,
    "rtn_mse": rtn_mse,
    "hqq": hqq,
    "gptq": gptq,
    "awq": awq,
    "rescale": rescale,
    "pack_rows": pack_rows,
    "pack_columns": pack_columns,
    "interleave_halves": interleave_halves,
}
