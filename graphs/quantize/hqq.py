"""Half-quadratic quantization: scales that keep most weights close and let outliers be far, without any calibration text.

Badri & Shaji 2023 (HQQ): minimize the sum of |w - s q|^p, p < 1, by splitting off an error e and minimizing
|e|^p + beta/2 (w - s q - e)^2 for e, which shrinks (a generalized soft threshold), and for the quantizer's parameter, in
turn, while beta grows. HQQ moves the zero point and leaves the scale. Here the scale moves, s = <q, w - e> / <q, q>: codes
are symmetric, or their zero points are codes themselves, whose nearest the search before has found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.rtn_mse import encoded, nearest_codes, row_blocks, search_grid, zeros_of

NORM = np.float32(0.7)  # p
BETA, BETA_GROWTH = 10.0, 1.05  # for errors in units of a step between two codes
ROUNDS = 20


def hqq(
    weight: NDArray[np.float32], *, bits: int, group_size: int, asymmetric: bool = False
) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] as `rtn_mse` does, for the least sum of |error|^0.7 in each group."""
    scales, zeros = search_grid(weight, bits=bits, group_size=group_size, asymmetric=asymmetric)
    zero_points = zeros_of(zeros, scales, bits)
    for block in row_blocks(*weight.shape):
        groups = weight[block].reshape(-1, scales.shape[1], group_size)
        scales[block] = _refine(groups, scales[block], zero_points[block][..., None], bits)
    return encoded(weight, (scales, zeros), bits=bits)


def _refine(
    groups: NDArray[np.float32], start: NDArray[np.float32], zeros: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """Better scales [rows, groups] of a block [rows, groups, group_size]; each group keeps the best it came by."""
    relative = groups / start[..., None]  # in steps of the scale to begin with
    scale = np.ones(start.shape, np.float32)
    best, least = scale, np.full(start.shape, np.inf, np.float32)
    for i in range(ROUNDS):
        codes = nearest_codes(relative, scale[..., None], bits, zeros)
        error = relative - codes * scale[..., None]
        size = np.abs(error)
        loss = (size**NORM).sum(axis=2)
        best, least = np.where(loss < least, scale, best), np.minimum(loss, least)
        threshold = np.maximum(size, np.float32(1e-8)) ** (NORM - 1) / np.float32(BETA * BETA_GROWTH**i)
        error = np.sign(error) * np.maximum(size - threshold, 0)
        power = np.einsum("rgi,rgi->rg", codes, codes)
        against = np.einsum("rgi,rgi->rg", codes, relative - error)
        found = against / np.maximum(power, 1)
        scale = np.where(found > 0, found, best).astype(np.float32)
    return np.maximum(best * start, np.finfo(np.float32).tiny)
