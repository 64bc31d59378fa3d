"""Round to nearest: symmetric codes, one scale per group of inputs, from the group's largest magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rtn(weight: NDArray[np.float32], *, bits: int, group_size: int) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to unsigned codes and float32 scales; value = scale * (code - 2**(bits-1)).

    Returns codes uint8 [outputs, inputs] in 1 … 2**bits - 1 (so that their mean can be zero) and scales
    [outputs, inputs / group_size], all positive (a group of zeros gets scale 1). `inputs` must be a multiple of
    `group_size`.
    """
    rows, columns = weight.shape
    zero_point = 1 << (bits - 1)
    largest_code = zero_point - 1
    groups = weight.reshape(rows, columns // group_size, group_size)
    extreme = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    # Not below the smallest normal number: a subnormal scale is imprecise, and may round to zero.
    scales = np.maximum(extreme / np.float32(largest_code), np.finfo(np.float32).tiny)
    scales[extreme == 0] = 1
    codes = groups / scales[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, -largest_code, largest_code, out=codes)
    codes += zero_point
    return {"codes": codes.astype(np.uint8).reshape(rows, columns), "scales": scales}
