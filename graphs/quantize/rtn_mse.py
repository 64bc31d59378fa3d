"""Round to nearest with searched scales: of a grid of clip ratios, each group takes the one with the least squared error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A group's scale is its largest magnitude over the largest code, times one of these. 1 clips nothing: plain `rtn`.
CLIP_RATIOS = tuple(1.0 - 0.025 * i for i in range(23))
BLOCK_ELEMENTS = 1 << 18  # searched at once: what fits in a processor's cache


def rtn_mse(weight: NDArray[np.float32], *, bits: int, group_size: int) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to unsigned codes and float32 scales; value = scale * (code - 2**(bits-1)).

    Returns codes uint8 [outputs, inputs] in 0 … 2**bits - 1 and scales [outputs, inputs / group_size], all positive.
    """
    scales = search_scales(weight, bits=bits, group_size=group_size)
    return {"codes": encode(weight, scales, bits=bits), "scales": scales}


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
    shape = (columns // group_size, group_size)
    weights = np.ones(shape, np.float32) if importance is None else _normalized(importance.reshape(shape))
    scales = np.empty((rows, shape[0]), np.float32)
    for block in row_blocks(rows, columns):
        scales[block] = _search(weight[block].reshape(-1, *shape), weights, bits, ratios)
    return scales


def encode(weight: NDArray[np.float32], scales: NDArray[np.float32], *, bits: int) -> NDArray[np.uint8]:
    """Nearest codes of [outputs, inputs], unsigned, all of 0 … 2**bits - 1 in use."""
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.uint8)
    zero_point = 1 << (bits - 1)
    for block in row_blocks(rows, columns):
        groups = weight[block].reshape(-1, scales.shape[1], columns // scales.shape[1])
        nearest = nearest_codes(groups, scales[block][..., None], bits)
        nearest += zero_point
        codes[block] = nearest.reshape(-1, columns).astype(np.uint8)
    return codes


def decode(codes: NDArray[np.uint8], scales: NDArray[np.float32], *, bits: int) -> NDArray[np.float32]:
    """The values [outputs, inputs] that codes and scales stand for."""
    rows, groups = scales.shape
    values = codes.reshape(rows, groups, -1).astype(np.float32) - np.float32(1 << (bits - 1))
    return (values * scales[..., None]).reshape(codes.shape)


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
    against = np.einsum("rgi,rgi,gi->rg", relative, codes, weights)
    power = np.einsum("rgi,rgi,gi->rg", codes, codes, weights)
    refined = np.where((against > 0) & (power > 0), against / np.where(power > 0, power, 1), found).astype(np.float32)
    error = _error(relative, nearest_codes(relative, refined[..., None], bits), refined[..., None], weights)
    better = error < least
    best[better] = np.maximum(refined * extreme, tiny)[better]
    best[extreme == 0] = 1
    return best


def nearest_codes(
    groups: NDArray[np.float32], scales: NDArray[np.float32] | np.float32, bits: int
) -> NDArray[np.float32]:
    """Signed codes as float32."""
    codes = groups / scales
    np.rint(codes, out=codes)
    np.clip(codes, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, out=codes)
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


def _normalized(importance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mean 1 in each group [groups, group_size]; a group of inputs that never came counts alike."""
    mean = importance.mean(axis=1, keepdims=True)
    return np.where(mean > 0, importance / np.where(mean > 0, mean, 1), 1).astype(np.float32)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut a matrix into blocks of rows that fit in a processor's cache."""
    size = max(1, BLOCK_ELEMENTS // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
