"""Round to nearest: one scale per group of inputs, from the group's largest magnitude, or from its range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rtn(
    weight: NDArray[np.float32], *, bits: int, group_size: int, asymmetric: bool = False
) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to unsigned codes and float32 scales; value = scale * (code - 2**(bits-1)).

    Returns codes uint8 [outputs, inputs] in 1 … 2**bits - 1 (so that their mean can be zero) and scales
    [outputs, inputs / group_size], all positive (a group of zeros gets scale 1). `inputs` must be a multiple of
    `group_size`. `asymmetric`: all codes are used, for a range from the least to the largest value and 0, and there are
    zeros uint8, of the scales' shape: value = scale * (code - zero).
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    if asymmetric:
        return _in_range(groups, bits)
    zero_point = 1 << (bits - 1)
    largest_code = zero_point - 1
    extreme = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    # Not below the smallest normal number: a subnormal scale is imprecise, and may round to zero.
    scales = np.maximum(extreme / np.float32(largest_code), np.finfo(np.float32).tiny)
    scales[extreme == 0] = 1
    codes = groups / scales[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, -largest_code, largest_code, out=codes)
    codes += zero_point
    return {"codes": codes.astype(np.uint8).reshape(rows, columns), "scales": scales}


def _in_range(groups: NDArray[np.float32], bits: int) -> dict[str, NDArray[Any]]:
    """Of groups [outputs, groups, group_size]. The range's ends are rounded to whole steps from 0, which stays exact."""
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    scales = np.maximum(high / top - low / top, np.finfo(np.float32).tiny)  # in this order it cannot overflow
    zeros = np.clip(np.rint(-low / scales), 0, top)
    empty = low == high
    scales[empty], zeros[empty] = 1, 1 << (bits - 1)
    codes = groups / scales[:, :, None]
    np.rint(codes, out=codes)
    codes += zeros[:, :, None]
    np.clip(codes, 0, top, out=codes)
    return {"codes": codes.astype(np.uint8).reshape(len(groups), -1), "scales": scales, "zeros": zeros.astype(np.uint8)}
