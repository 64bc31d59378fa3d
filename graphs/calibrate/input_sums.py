"""Sums over the inputs of one matrix, as they come: all that calibrated methods need to know of them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.spec.quant_scheme import GROUP_SIZES

# What is kept of X^T X: all of it, blocks on its diagonal, or nothing.
Products = Literal["whole", "blocks", "none"]


class InputSums:
    """How many tokens came, sum and maximum of |x|, and what is kept of X^T X. All in float32.

    While they take less than half its room, the inputs X themselves are kept in place of a whole X^T X: an expert sees few.
    """

    def __init__(self, size: int, products: Products) -> None:
        self.tokens = 0
        self.magnitude = torch.zeros(size)
        self.largest = torch.zeros(size)
        self.products = {
            "whole": lambda: {"rows": torch.empty(0, size)},
            "blocks": lambda: {"blocks": torch.zeros(_blocks(size))},
            "none": lambda: {},
        }[products]()

    def add(self, x: Tensor) -> None:
        """Count inputs [..., size]."""
        rows = x.detach().flatten(0, -2).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        absolute = rows.abs()
        self.magnitude += absolute.sum(0)
        self.largest = torch.maximum(self.largest, absolute.amax(0))
        if "rows" in self.products:
            self.products["rows"] = torch.cat([self.products["rows"], rows])
            if self.tokens > rows.shape[1] // 2:
                rows = self.products.pop("rows")
                self.products["hessian"] = rows.T @ rows
        elif "hessian" in self.products:
            self.products["hessian"].addmm_(rows.T, rows)
        if "blocks" in self.products:
            blocks = self.products["blocks"]
            parts = rows.unflatten(1, blocks.shape[:2]).transpose(0, 1)  # [blocks, tokens, block size]
            blocks.baddbmm_(parts.transpose(1, 2), parts)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As stored: "tokens" int64 [1], "magnitude" and "largest" float32 [n], and at most one of "rows" [tokens, n],
        "hessian" [n, n] and "blocks" [n / b, b, b]."""
        return {
            "tokens": np.array([self.tokens]),
            "magnitude": self.magnitude.numpy(),
            "largest": self.largest.numpy(),
            **{name: product.numpy() for name, product in self.products.items()},
        }


def _blocks(size: int) -> tuple[int, int, int]:
    """As large as the largest group that divides the inputs: smaller groups' blocks lie within."""
    block = max(group for group in (1, *GROUP_SIZES) if size % group == 0)
    return size // block, block, block
