"""The storage layout of corral's CPU kernels: tiles of 16 outputs (kernels/src/kernels.h)."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from corral.spec.cpu_ops import TILE_OUTPUTS
from corral.spec.errors import InputError


def tile_codes(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint8]:
    """Codes [outputs, inputs] of 2, 3, 4 or 8 bits -> bytes [outputs / 16, 2 * bits * inputs].

    A tile is a row of vectors of 64 bytes, whose byte 4r + c belongs to output r and the c-th of each four inputs; 8 / bits
    fours share a vector, the first in the lowest bits. 3 bits: for each 32 inputs two vectors of the low 2 bits, then one of
    the high bits.
    """
    outputs, inputs = codes.shape
    tiles = codes.reshape(outputs // TILE_OUTPUTS, TILE_OUTPUTS, inputs // 4, 4).transpose(0, 2, 1, 3)
    if bits == 3:
        by_block = (len(tiles), inputs // 32, -1, TILE_OUTPUTS, 4)
        low, high = _shared(tiles & np.uint8(3), 2), _shared(tiles >> np.uint8(2), 1)
        vectors = np.concatenate([low.reshape(by_block), high.reshape(by_block)], axis=2)
    else:
        vectors = _shared(tiles, bits)
    return np.ascontiguousarray(vectors).reshape(outputs // TILE_OUTPUTS, 2 * bits * inputs)


def _shared(fours: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[tiles, fours, 16, 4] -> as many fours in one as a byte has room for."""
    count = 8 // bits
    return functools.reduce(
        np.bitwise_or, (fours[:, i::count] << np.uint8(bits * i) for i in range(count)), np.zeros((), np.uint8)
    )


def tile_zeros(zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Zero points [outputs, groups] of up to 4 bits -> bytes [outputs / 16, groups, 8]: an output and the eighth after it
    share a byte, the first in the low half."""
    tiles = zeros.reshape(-1, 2, TILE_OUTPUTS // 2, zeros.shape[1])
    return np.ascontiguousarray((tiles[:, 0] | (tiles[:, 1] << np.uint8(4))).transpose(0, 2, 1))


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
