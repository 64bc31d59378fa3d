"""Sums over the inputs of one matrix, as they come: all that calibrated methods need to know of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class InputSums:
    """How many tokens came, sum of |x| and, with `hessian`, X^T X; else only its diagonal. All in float32."""

    def __init__(self, size: int, *, hessian: bool) -> None:
        self.tokens = 0
        self.magnitude = torch.zeros(size)
        self.products = torch.zeros(size, size) if hessian else torch.zeros(size)

    def add(self, x: Tensor) -> None:
        """Count inputs [..., size]."""
        rows = x.detach().flatten(0, -2).float()
        self.tokens += len(rows)
        self.magnitude += rows.abs().sum(0)
        if self.products.dim() == 2:
            self.products.addmm_(rows.T, rows)
        else:
            self.products += rows.square().sum(0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As stored: "tokens" int64 [1], "magnitude" float32 [n], and "hessian" [n, n] or "squares" [n]."""
        name = "hessian" if self.products.dim() == 2 else "squares"
        return {
            "tokens": np.array([self.tokens]),
            "magnitude": self.magnitude.numpy(),
            name: self.products.numpy(),
        }
