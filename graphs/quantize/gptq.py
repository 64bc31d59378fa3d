"""GPTQ: round column after column, and let the columns still to come make up for each rounding error.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. With H = X^T X of the matrix's inputs X and H^-1 = U^T U, U upper
triangular, column j's error (w_j - q_j) / U_jj is taken from the columns after it, times U's row j.

Scales are chosen before, group by group of the stored layout, so that columns may be rounded in any order: those whose
inputs are strongest first ("activation order"), when all others can still make up for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.graphs.quantize.rtn_mse import Grid, rtn_mse, search_grid, stored_grid, zeros_of

BLOCK = 128  # columns whose errors are put off, and then applied to all later ones as one product
DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that hardly vary have no exact answer


def gptq(
    weight: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    asymmetric: bool = False,
    min_tokens: int,
    statistics: Mapping[str, NDArray[Any]],
    act_order: bool = True,
) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] as `rtn_mse` does, for least error of the product with the inputs that were seen.

    `statistics`: "tokens", how many inputs they were, and float32 "hessian" [inputs, inputs], X^T X of them, or "rows"
    [tokens, inputs], X itself. Fewer than `min_tokens` say too little: the result is then `rtn_mse`'s. One thread, so that
    it is the same bytes wherever it runs.
    """
    if statistics["tokens"].item() < min_tokens:
        return rtn_mse(weight, bits=bits, group_size=group_size, asymmetric=asymmetric)
    with _one_thread():
        hessian = _hessian(statistics)
        importance = hessian.diagonal() + _damping(hessian)
        grid = search_grid(weight, bits=bits, group_size=group_size, asymmetric=asymmetric, importance=importance)
        codes = _round(weight, grid, hessian, bits=bits, act_order=act_order)
    return {"codes": codes} | stored_grid(grid)


def _round(
    weight: NDArray[np.float32],
    grid: Grid,
    hessian: NDArray[np.float32],
    *,
    bits: int,
    act_order: bool,
) -> NDArray[np.uint8]:
    """Codes [outputs, inputs] on a given grid."""
    (scales, zeros), inputs = grid, weight.shape[1]
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(inputs)
    group_of = order // (inputs // scales.shape[1])
    upper = _inverse_factor(hessian, order).float()
    left = torch.from_numpy(weight.T[order])  # [inputs, outputs], in the order of rounding; a copy
    scale_of, zero_of = (
        torch.from_numpy(np.ascontiguousarray(array.T)) for array in (scales, zeros_of(zeros, scales, bits))
    )
    codes = np.empty((inputs, weight.shape[0]), np.uint8)
    top = (1 << bits) - 1
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(stop - start, weight.shape[0])
        for j in range(start, stop):
            scale, zero = scale_of[group_of[j]], zero_of[group_of[j]]
            code = torch.round(left[j] / scale).clamp_(-zero, top - zero)
            error = (left[j] - code * scale) / upper[j, j]
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
            codes[order[j]] = (code + zero).to(torch.uint8).numpy()
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return np.ascontiguousarray(codes.T)


def _hessian(statistics: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    if "hessian" in statistics:
        return statistics["hessian"]
    rows = torch.from_numpy(statistics["rows"])
    return (rows.T @ rows).numpy()


def _damping(hessian: NDArray[np.float32]) -> float:
    """What is added to the diagonal, so that inputs that hardly came count a little; 1 where none ever came."""
    return DAMPING * float(hessian.diagonal().mean(dtype=np.float64)) or 1.0


def _inverse_factor(hessian: NDArray[np.float32], order: NDArray[np.int64]) -> Tensor:
    """U, upper triangular in float64, with U^T U = (H + damping)^-1, H's rows and columns taken in `order`.

    H = R R^T with R upper triangular is a Cholesky decomposition from the last row up; then U = R^-1. One decomposition
    and one triangular inverse, in place of an inverse and two decompositions.
    """
    backwards = order[::-1].copy()
    matrix = torch.from_numpy(hessian)[backwards][:, backwards].double()
    matrix.diagonal().add_(_damping(hessian))
    lower = torch.linalg.cholesky(matrix)
    del matrix
    upper = lower.flip(0, 1)
    del lower
    _invert(upper)
    return upper


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in its own place: a third of the work of solving for the identity.

    [A B; 0 C]^-1 = [A^-1  -A^-1 B C^-1; 0  C^-1], the halves likewise.
    """
    if len(upper) <= BLOCK:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True))
        return
    half = len(upper) // 2
    first, last = slice(0, half), slice(half, None)
    _invert(upper[first, first])
    _invert(upper[last, last])
    upper[first, last] = -(upper[first, first] @ upper[first, last]) @ upper[last, last]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are split among threads, and so rounded, differently for each number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
