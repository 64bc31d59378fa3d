"""The storage layout of corral's CPU kernels: tiles of 16 outputs (kernels/src/kernels.h)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from corral.spec.cpu_ops import TILE_OUTPUTS
from corral.spec.errors import InputError


def tile_codes(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint8]:
    """Codes [outputs, inputs] of 4 or 8 bits -> bytes [outputs / 16, 2 * bits * inputs].

    8 bits: for each 4 inputs k … k+3 a tile has 64 bytes, and byte 4r + c is code[r, k + c]. 4 bits: for each 8 inputs
    k … k+7 it has 64 bytes, and byte 4r + c is code[r, k + c] | code[r, k + 4 + c] << 4.
    """
    outputs, inputs = codes.shape
    fours = codes.reshape(outputs // TILE_OUTPUTS, TILE_OUTPUTS, inputs // 4, 4)
    stored = fours if bits == 8 else fours[:, :, 0::2] | (fours[:, :, 1::2] << np.uint8(4))
    return np.ascontiguousarray(stored.transpose(0, 2, 1, 3)).reshape(outputs // TILE_OUTPUTS, 2 * bits * inputs)


def tile_scales(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """[outputs, groups] -> fp16 [outputs / 16, groups, 16]. Raises InputError for a scale that fp16 cannot hold."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError(
            f"a group of weights has the scale {np.abs(scales).max():.3g}; corral's CPU kernels keep scales in fp16, at "
            "most 65504. Compile with --kernels stock."
        )
    return np.ascontiguousarray(half.reshape(-1, TILE_OUTPUTS, half.shape[1]).transpose(0, 2, 1))
