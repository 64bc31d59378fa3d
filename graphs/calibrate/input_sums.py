"""Sums over the inputs of one matrix, as they come: all that calibrated methods need to know of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.spec.quant_scheme import GROUP_SIZES


class InputSums:
    """How many tokens came, sum of |x| and, with `hessian`, X^T X; else the blocks on its diagonal. All in float32."""

    def __init__(self, size: int, *, hessian: bool) -> None:
        self.tokens = 0
        self.magnitude = torch.zeros(size)
        self.products = torch.zeros(size, size) if hessian else torch.zeros(_blocks(size))

    def add(self, x: Tensor) -> None:
        """Count inputs [..., size]."""
        rows = x.detach().flatten(0, -2).float()
        self.tokens += len(rows)
        self.magnitude += rows.abs().sum(0)
        if self.products.dim() == 2:
            self.products.addmm_(rows.T, rows)
        else:
            parts = rows.unflatten(1, self.products.shape[:2]).transpose(0, 1)  # [blocks, tokens, block size]
            self.products.baddbmm_(parts.transpose(1, 2), parts)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As stored: "tokens" int64 [1], "magnitude" float32 [n], and "hessian" [n, n] or "blocks" [n / b, b, b]."""
        name = "hessian" if self.products.dim() == 2 else "blocks"
        return {
            "tokens": np.array([self.tokens]),
            "magnitude": self.magnitude.numpy(),
            name: self.products.numpy(),
        }


def _blocks(size: int) -> tuple[int, int, int]:
    """As large as the largest group that divides the inputs: smaller groups' blocks lie within."""
    block = max(group for group in (1, *GROUP_SIZES) if size % group == 0)
    return size // block, block, block
