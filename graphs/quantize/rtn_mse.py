"""Round to nearest with searched scales: of a grid of clip ratios, each group takes the one with the least squared error.

Zero points are searched with them where codes are asymmetric.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What `scale * (code - zero)` is for each group, [outputs, groups]: scales, and zero points where codes are asymmetric.
Grid = tuple[NDArray[np.float32], NDArray[np.uint8] | None]

# A group's scale is its largest magnitude over the largest code, times one of these. 1 clips nothing: plain `rtn`.
CLIP_RATIOS = tuple(1.0 - 0.025 * i for i in range(23))
BLOCK_ELEMENTS = 1 << 18  # searched at once: what fits in a processor's cache


def rtn_mse(
    weight: NDArray[np.float32], *, bits: int, group_size: int, asymmetric: bool = False
) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to unsigned codes and float32 scales; value = scale * (code - 2**(bits-1)).

    Returns codes uint8 [outputs, inputs] in 0 … 2**bits - 1 and scales [outputs, inputs / group_size], all positive; with
    `asymmetric` also zeros, uint8 and of the scales' shape: value = scale * (code - zero).
    """
    return encoded(weight, search_grid(weight, bits=bits, group_size=group_size, asymmetric=asymmetric), bits=bits)


def search_grid(
    weight: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    asymmetric: bool,
    importance: NDArray[np.floating] | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> Grid:
    """`search_scales`, and where codes are `asymmetric` the zero points that lower the error further."""
    scales = search_scales(weight, bits=bits, group_size=group_size, importance=importance, ratios=ratios)
    if not asymmetric:
        return scales, None
    weights = _weights(importance, scales.shape[1], group_size)
    zeros = np.empty(scales.shape, np.uint8)
    for block in row_blocks(*weight.shape):
        groups = weight[block].reshape(-1, *weights.shape)
        scales[block], zeros[block] = _search_zeros(groups, scales[block], weights, bits, ratios)
    return scales, zeros


def search_scales(
    weight: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    importance: NDArray[np.floating] | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> NDArray[np.float32]:
    """Scales [outputs, groups] of least squared error over clip `ratios`, then over all scales for the codes so found.

    `importance` [inputs] weighs each input's squared error (the mean square of its activations, say); None: all alike.
    The refinement is the least-squares scale of fixed codes, <w, q> / <q, q>, taken where it lowers the error.
    """
    rows, columns = weight.shape
    weights = _weights(importance, columns // group_size, group_size)
    scales = np.empty((rows, len(weights)), np.float32)
    for block in row_blocks(rows, columns):
        scales[block] = _search(weight[block].reshape(-1, *weights.shape), weights, bits, ratios)
    return scales


def encoded(weight: NDArray[np.float32], grid: Grid, *, bits: int) -> dict[str, NDArray[Any]]:
    """What a quantizer gives: the nearest codes of [outputs, inputs] on a grid, and the grid."""
    return {"codes": encode(weight, *grid, bits=bits)} | stored_grid(grid)


def stored_grid(grid: Grid) -> dict[str, NDArray[Any]]:
    """A grid by the names of what is stored: scales, and zeros where it has them."""
    scales, zeros = grid
    return {"scales": scales} | ({} if zeros is None else {"zeros": zeros})


def encode(
    weight: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None = None, *, bits: int
) -> NDArray[np.uint8]:
    """Nearest codes of [outputs, inputs], unsigned, all of 0 … 2**bits - 1 in use."""
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.uint8)
    zero_points = zeros_of(zeros, scales, bits)
    for block in row_blocks(rows, columns):
        groups = weight[block].reshape(-1, scales.shape[1], columns // scales.shape[1])
        zero = zero_points[block][..., None]
        nearest = nearest_codes(groups, scales[block][..., None], bits, zero)
        nearest += zero
        codes[block] = nearest.reshape(-1, columns).astype(np.uint8)
    return codes


def decode(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None = None, *, bits: int
) -> NDArray[np.float32]:
    """The values [outputs, inputs] that codes, scales and zero points stand for."""
    rows, groups = scales.shape
    values = codes.reshape(rows, groups, -1).astype(np.float32) - zeros_of(zeros, scales, bits)[..., None]
    return (values * scales[..., None]).reshape(codes.shape)


def zeros_of(zeros: NDArray[np.uint8] | None, scales: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Zero points for each of `scales`: those of symmetric codes where there are none."""
    return np.full(scales.shape, 1 << (bits - 1), np.float32) if zeros is None else zeros.astype(np.float32)


def _search(
    groups: NDArray[np.float32], weights: NDArray[np.float32], bits: int, ratios: tuple[float, ...]
) -> NDArray[np.float32]:
    """Scales [rows, groups] of a block [rows, groups, group_size]."""
    tiny = np.finfo(np.float32).tiny  # as in `rtn`: no scale below the smallest normal number
    extreme = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    widest = extreme / np.float32((1 << (bits - 1)) - 1)
    best, least = np.maximum(widest, tiny), np.full(extreme.shape, np.inf, np.float32)
    relative = groups / np.maximum(extreme, tiny)[..., None]  # in -1 … 1: errors can neither overflow nor vanish
    unit = np.float32(1 / ((1 << (bits - 1)) - 1))
    for ratio in ratios:
        scale = np.float32(ratio) * unit
        error = _error(relative, nearest_codes(relative, scale, bits), scale, weights)
        better = error < least
        least[better] = error[better]
        best[better] = np.maximum(widest * np.float32(ratio), tiny)[better]
    found = best / np.maximum(extreme, tiny)
    codes = nearest_codes(relative, found[..., None], bits)
    refined = least_squares_scale(relative, codes, weights, found)
    error = _error(relative, nearest_codes(relative, refined[..., None], bits), refined[..., None], weights)
    better = error < least
    best[better] = np.maximum(refined * extreme, tiny)[better]
    best[extreme == 0] = 1
    return best


def _search_zeros(
    groups: NDArray[np.float32],
    symmetric: NDArray[np.float32],
    weights: NDArray[np.float32],
    bits: int,
    ratios: tuple[float, ...],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points [rows, groups] of a block [rows, groups, group_size]: the `symmetric` scales, or better ones."""
    extreme = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    unit = np.where(extreme > 0, extreme, 1).astype(np.float32)
    relative = groups / unit[..., None]  # in -1 … 1: errors can neither overflow nor vanish
    scales, zeros = symmetric / unit, zeros_of(None, symmetric, bits)
    least = np.full(extreme.shape, np.inf, np.float32)

    def keep(scale: NDArray[np.float32], zero: NDArray[np.float32]) -> None:
        codes = nearest_codes(relative, scale[..., None], bits, zero[..., None])
        error = _error(relative, codes, scale[..., None], weights)
        better = error < least
        least[better], scales[better], zeros[better] = error[better], scale[better], zero[better]

    keep(scales, zeros)
    for scale, zero in clipped_ranges(relative, bits, ratios):
        keep(scale, zero)
    codes = nearest_codes(relative, scales[..., None], bits, zeros[..., None])
    keep(least_squares_scale(relative, codes, weights, scales), zeros)
    return np.where(extreme > 0, np.maximum(scales * unit, np.finfo(np.float32).tiny), symmetric), zeros


def clipped_ranges(
    groups: NDArray[np.float32], bits: int, ratios: tuple[float, ...]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Scales and zero points [..., groups] of asymmetric codes that cover the range of [..., groups, group_size], or a share
    of it: the nearest zero points, and their neighbours."""
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    width = np.maximum(high - low, np.finfo(np.float32).tiny)
    nearest = np.rint(-low / width * top)
    for ratio in ratios:
        for shift in (0, -1, 1):
            yield width * np.float32(ratio) / top, np.clip(nearest + np.float32(shift), 0, top)


def least_squares_scale(
    groups: NDArray[np.float32],
    codes: NDArray[np.float32],
    weights: NDArray[np.float32],
    otherwise: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The scales of least weighed squared error for fixed signed codes, <w, q> / <q, q>, where those are positive."""
    against = np.einsum("rgi,rgi,gi->rg", groups, codes, weights)
    power = np.einsum("rgi,rgi,gi->rg", codes, codes, weights)
    return np.where((against > 0) & (power > 0), against / np.where(power > 0, power, 1), otherwise).astype(np.float32)


def nearest_codes(
    groups: NDArray[np.float32],
    scales: NDArray[np.float32] | np.float32,
    bits: int,
    zeros: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Signed codes (less their zero points) as float32."""
    zero = np.float32(1 << (bits - 1)) if zeros is None else zeros
    codes = groups / scales
    np.rint(codes, out=codes)
    np.clip(codes, -zero, np.float32((1 << bits) - 1) - zero, out=codes)
    return codes


def _error(
    groups: NDArray[np.float32],
    codes: NDArray[np.float32],
    scales: NDArray[np.float32] | np.float32,
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Weighted squared error of each group [rows, groups]."""
    difference = codes * scales
    difference -= groups
    return np.einsum("rgi,rgi,gi->rg", difference, difference, weights)


def _weights(importance: NDArray[np.floating] | None, groups: int, group_size: int) -> NDArray[np.float32]:
    """Importance [inputs] with mean 1 in each group, [groups, group_size]; a group of inputs that never came counts alike."""
    if importance is None:
        return np.ones((groups, group_size), np.float32)
    importance = importance.reshape(groups, group_size)
    mean = importance.mean(axis=1, keepdims=True)
    return np.where(mean > 0, importance / np.where(mean > 0, mean, 1), 1).astype(np.float32)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut a matrix into blocks of rows that fit in a processor's cache."""
    size = max(1, BLOCK_ELEMENTS // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
