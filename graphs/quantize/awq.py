"""AWQ: inputs that matter most are scaled up before rounding, and what made them is scaled down, which is exact.

Lin et al. 2023 (arXiv 2306.00978): W x = (W diag(s)) (x / s); with s = (mean |x|)^alpha strong inputs lose less to
rounding (eqs. 4 and 5). Who makes x divides by s: the norm before, or the matrix before. Then each group's scale is
clipped for least error of what comes out (section 3.2's clipping), for which the group's own part of X^T X is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.rtn_mse import (
    CLIP_RATIOS,
    Grid,
    clipped_ranges,
    decode,
    encoded,
    nearest_codes,
    row_blocks,
    rtn_mse,
    search_grid,
    zeros_of,
)

# Of a site's inputs: 0 scales nothing; more than this hurts the weak ones.
ALPHAS = tuple(0.1 * i for i in range(10))
SEARCH_RATIOS = CLIP_RATIOS[:13:4]  # the search for alpha clips more coarsely
DAMPING = 0.01  # as in GPTQ


def rescale(weight: NDArray[np.float32], *, statistics: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """A matrix [outputs, inputs] times its "input_scales" and over its "output_scales", where it has those; or a vector."""
    if "input_scales" in statistics:
        weight = weight * statistics["input_scales"]
    if "output_scales" in statistics:
        divisor = statistics["output_scales"]
        weight = weight / (divisor if weight.ndim == 1 else divisor[:, None])
    return weight


def awq(
    weight: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    asymmetric: bool = False,
    min_tokens: int,
    statistics: Mapping[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """Rescale [outputs, inputs] and quantize it as `rtn_mse` does, for least error of each group's product.

    `statistics`: the scales that `rescale` wants, "tokens", and "blocks" float32 [inputs / n, n, n], the blocks of X^T X on
    its diagonal. After fewer than `min_tokens` the result is `rtn_mse`'s of the rescaled matrix.
    """
    scaled = rescale(weight, statistics=statistics)
    if statistics["tokens"].item() < min_tokens:
        return rtn_mse(scaled, bits=bits, group_size=group_size, asymmetric=asymmetric)
    blocks = group_blocks(statistics["blocks"], group_size)
    if "input_scales" in statistics:
        blocks = unscaled(blocks, statistics["input_scales"])
    return encoded(scaled, search_clipped(scaled, blocks, bits=bits, asymmetric=asymmetric), bits=bits)


def group_blocks(blocks: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """The smaller blocks [groups, group_size, group_size] on the diagonal of larger ones."""
    parts = blocks.shape[1] // group_size
    cut = blocks.reshape(len(blocks), parts, group_size, parts, group_size)
    return np.ascontiguousarray(cut[:, range(parts), :, range(parts)].swapaxes(0, 1)).reshape(
        -1, group_size, group_size
    )


def unscaled(blocks: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blocks of X^T X for inputs that are divided by `scales`."""
    inverse = (np.float32(1) / scales).reshape(len(blocks), -1)
    both: NDArray[np.float32] = inverse[:, :, None] * inverse[:, None, :]
    return blocks * both


def search_clipped(
    weight: NDArray[np.float32],
    blocks: NDArray[np.float32],
    *,
    bits: int,
    asymmetric: bool = False,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> Grid:
    """Grids [outputs, groups] of least r H r^T over clip ratios, r a group's rounding error and H its block, damped."""
    size = blocks.shape[1]
    strength = blocks.diagonal(axis1=1, axis2=2)
    damped = blocks + np.eye(size, dtype=np.float32) * (DAMPING * strength.mean() or 1.0)
    scales = np.empty((len(weight), len(blocks)), np.float32)
    zeros = np.empty(scales.shape, np.uint8) if asymmetric else None
    for block in row_blocks(*weight.shape):
        groups = np.ascontiguousarray(
            weight[block].reshape(-1, *blocks.shape[:2]).swapaxes(0, 1)
        )  # [groups, rows, size]
        extreme = np.abs(groups).max(axis=2)
        widest = np.where(extreme > 0, extreme / np.float32((1 << (bits - 1)) - 1), 1).astype(np.float32)
        middle = zeros_of(None, widest, bits)
        candidates = [(widest * np.float32(ratio), middle) for ratio in ratios]
        if asymmetric:
            candidates += clipped_ranges(groups, bits, ratios)
        best, least = candidates[0], np.full(extreme.shape, np.inf, np.float32)
        for scale, zero in candidates:
            scale = np.maximum(scale, np.finfo(np.float32).tiny)
            error = nearest_codes(groups, scale[..., None], bits, zero[..., None]) * scale[..., None] - groups
            loss = np.einsum("gri,gri->gr", error @ damped, error)
            better = loss < least
            best = np.where(better, scale, best[0]), np.where(better, zero, best[1])
            least = np.where(better, loss, least)
        scales[block] = np.where(extreme > 0, best[0], 1).T
        if zeros is not None:
            zeros[block] = np.where(extreme > 0, best[1], middle).T
    return scales, zeros


def input_scales(magnitude: NDArray[np.float64], alpha: float) -> NDArray[np.float32]:
    """s = magnitude^alpha, divided by the geometric mean of its extremes; inputs that hardly came count as the weakest."""
    floor = magnitude.mean() * 1e-4
    if floor == 0:
        return np.ones(len(magnitude), np.float32)
    powers = np.maximum(magnitude, floor) ** alpha
    return (powers / np.sqrt(powers.max() * powers.min())).astype(np.float32)


def alpha_losses(
    weight: NDArray[np.float32],
    magnitude: NDArray[np.float64],
    blocks: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    asymmetric: bool = False,
) -> NDArray[np.float64]:
    """For each of ALPHAS, the squared error of a matrix's product with its inputs, group by group; `blocks` as gathered."""
    parts, losses = group_blocks(blocks, group_size), []
    for alpha in ALPHAS:
        scale = input_scales(magnitude, alpha)
        scaled, part = weight * scale, unscaled(parts, scale)
        importance = part.diagonal(axis1=1, axis2=2).reshape(-1)
        found = search_grid(
            scaled, bits=bits, group_size=group_size, asymmetric=asymmetric, importance=importance, ratios=SEARCH_RATIOS
        )
        error = decode(**encoded(scaled, found, bits=bits), bits=bits) - scaled
        by_group = np.ascontiguousarray(error.reshape(len(error), *part.shape[:2]).swapaxes(0, 1))
        losses.append(float(np.einsum("gri,gri->", by_group @ part, by_group, dtype=np.float64)))
    return np.array(losses)
