"""The functions that plan entries name: pure, from numpy arrays to numpy arrays. A table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.awq import awq, rescale
from corral.graphs.quantize.e4m3 import e4m3, gains, input_scale
from corral.graphs.quantize.fragments import fragment_scales, pack_fragments
from corral.graphs.quantize.gptq import gptq
from corral.graphs.quantize.hqq import hqq
from corral.graphs.quantize.pack import pack_columns, pack_rows, pack_signed_rows, pack_zero_rows
from corral.graphs.quantize.rtn import rtn
from corral.graphs.quantize.rtn_mse import rtn_mse
from corral.graphs.quantize.tiles import tile_codes, tile_scales, tile_zeros
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


def take(array: NDArray[np.generic], *, axis: int, start: int, stop: int) -> NDArray[np.generic]:
    """Part of what was quantized as a whole: rows (axis 0) or columns (axis 1) from `start` to `stop`."""
    return array[start:stop] if axis == 0 else array[:, start:stop]


def as_published(
    stored: Mapping[str, NDArray[Any]], *, bits: int, group_size: int, asymmetric: bool = False
) -> Mapping[str, NDArray[Any]]:
    """Codes and scales as the checkpoint has them, in the form that quantizers give: unsigned codes of `bits`, uint8
    [outputs, inputs], float32 scales [outputs, inputs / group_size], and with `asymmetric` zeros, uint8, alike."""
    rows, columns = stored["codes"].shape
    if stored["scales"].shape != (rows, columns // group_size) or columns % group_size or bits != 4:
        raise AssertionError(f"codes {rows} x {columns}, scales {stored['scales'].shape}: not int{bits} g{group_size}")
    if ("zeros" in stored) != asymmetric:
        raise AssertionError(f"asymmetric is {asymmetric}, and the checkpoint has {', '.join(stored)}")
    return stored


STEPS: dict[str, Callable[..., Any]] = {
    "rows": rows,
    "columns": columns,
    "rtn": rtn,
    "rtn_mse": rtn_mse,
    "hqq": hqq,
    "gptq": gptq,
    "awq": awq,
    "rescale": rescale,
    "e4m3": e4m3,
    "gains": gains,
    "input_scale": input_scale,
    "as_published": as_published,
    "take": take,
    "pack_rows": pack_rows,
    "pack_signed_rows": pack_signed_rows,
    "pack_zero_rows": pack_zero_rows,
    "pack_columns": pack_columns,
    "tile_codes": tile_codes,
    "tile_scales": tile_scales,
    "tile_zeros": tile_zeros,
    "pack_fragments": pack_fragments,
    "fragment_scales": fragment_scales,
}
