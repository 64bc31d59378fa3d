"""FP4 (e2m1) weights in blocks of inputs that share a scale of 8 bits: NVFP4 and MXFP4.

    NVFP4   blocks of 16, scales e4m3, and a float32 scale     value = scale * block * code
    MXFP4   blocks of 32, scales e8m0 (powers of two)          value = block * code

NVFP4 as published has one float32 scale a matrix; here it has one an output, as FP8 has: so a part of the outputs is a job,
and matrices can be joined. MXFP4 is that of the OCP Microscaling Formats specification 1.0 (its 6.3 is method "rtn").
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.e4m3 import SMALLEST_SCALE, largest_magnitudes
from corral.graphs.quantize.rtn_mse import row_blocks

LARGEST = 6.0  # of float4_e2m1fn (OCP Microscaling Formats, table 5)
LARGEST_EXPONENT = 2  # of a code: 6 is 1.5 * 2^2
# Of 16 numbers, by code: bit 3 is the sign. Code by twice the magnitude.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CODES = np.array([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7], np.uint8)
NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
# A scale by its byte; of both formats, greater bytes are greater scales.
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E8M0 = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
LARGEST_BLOCK = 256.0  # scale of an output's largest block: not the largest of e4m3, so that a search can look above it
# What "rtn-mse" tries, in bytes from the scale that "rtn" takes, which comes first. The next e4m3 scale is 6 to 12 % away;
# scales from 4 on make the largest magnitude a 4, where codes lie closer. Others are never the best.
NVFP4_OFFSETS = (0, -1, 1, -2, 2, 3, 4, 5, 6, 7)
MXFP4_OFFSETS = (0, -1, 1)


def nvfp4(weight: NDArray[np.float32], *, method: str) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to NVFP4: codes uint8 0 … 15, `blocks` float8_e4m3fn [outputs, inputs / 16], all positive,
    `scales` float32 [outputs, 1], and the `values` that they stand for.

    `method`: "rtn" takes a block's scale from its largest magnitude, "rtn-mse" the one near it with the least squared error.
    Raises InputError where a weight is not finite.
    """
    extreme = largest_magnitudes(weight, "FP4")
    scales = np.maximum(extreme / np.float32(LARGEST * LARGEST_BLOCK), np.float32(SMALLEST_SCALE))
    scales[extreme == 0] = 1
    codes, blocks, values = _like(weight, NVFP4_BLOCK)
    for part in row_blocks(*weight.shape):
        groups = (weight[part] / scales[part]).reshape(-1, blocks.shape[1], NVFP4_BLOCK)
        wanted = np.maximum(np.abs(groups).max(axis=2) / np.float32(LARGEST), E4M3[1])
        nominal = wanted.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        blocks[part] = nominal if method == "rtn" else _search(groups, nominal, NVFP4_OFFSETS, E4M3, lowest=1)
        codes[part], values[part] = _coded(groups, E4M3[blocks[part]])
        values[part] *= scales[part]
    return {"codes": codes, "blocks": blocks.view(ml_dtypes.float8_e4m3fn), "scales": scales, "values": values}


def mxfp4(weight: NDArray[np.float32], *, method: str) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to MXFP4: codes uint8 0 … 15, `blocks` float8_e8m0fnu [outputs, inputs / 32], and `values`.

    `method` and errors as of `nvfp4`. "rtn" scales a block's largest magnitude to 4 … 8, so that up to a quarter is clipped.
    """
    largest_magnitudes(weight, "FP4")
    codes, blocks, values = _like(weight, MXFP4_BLOCK)
    for part in row_blocks(*weight.shape):
        groups = weight[part].reshape(-1, blocks.shape[1], MXFP4_BLOCK)
        _, exponent = np.frexp(np.abs(groups).max(axis=2))  # of a mantissa of 0.5 … 1: one more than its logarithm
        nominal = np.clip(exponent - 1 - LARGEST_EXPONENT + 127, 0, 254).astype(np.uint8)
        blocks[part] = nominal if method == "rtn" else _search(groups, nominal, MXFP4_OFFSETS, E8M0, lowest=0)
        codes[part], values[part] = _coded(groups, E8M0[blocks[part]])
    return {"codes": codes, "blocks": blocks.view(ml_dtypes.float8_e8m0fnu), "values": values}


def nearest(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers of e2m1, halves to even codes, ±6 for what is beyond."""
    size = np.minimum(np.abs(values), np.float32(LARGEST))
    step = np.float32(0.5) * (1 + (size >= 2) + 2 * (size >= 4))  # between neighbours: 0.5, from 2 on 1, from 4 on 2
    np.rint(size / step, out=size)
    size *= step
    return np.copysign(size, values)


def encode(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes 0 … 15 of numbers that e2m1 has."""
    codes = CODES[(2 * np.abs(numbers)).astype(np.uint8)]
    codes |= np.signbit(numbers).astype(np.uint8) << np.uint8(3)
    return codes


def _like(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Room for codes, bytes of blocks' scales and values."""
    outputs, inputs = weight.shape
    return np.empty(weight.shape, np.uint8), np.empty((outputs, inputs // block), np.uint8), np.empty_like(weight)


def _coded(groups: NDArray[np.float32], scales: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and values [outputs, inputs] of groups [outputs, blocks, block] with scales [outputs, blocks]."""
    numbers = nearest(groups / scales[..., None])
    return encode(numbers).reshape(len(groups), -1), (numbers * scales[..., None]).reshape(len(groups), -1)


def _search(
    groups: NDArray[np.float32],
    nominal: NDArray[np.uint8],
    offsets: tuple[int, ...],
    table: NDArray[np.float32],
    *,
    lowest: int,
) -> NDArray[np.uint8]:
    """Bytes of the scales of least squared error [outputs, blocks] among those at `offsets` from the nominal ones."""
    best, least = nominal, np.full(nominal.shape, np.inf, np.float32)
    unit = table[nominal][..., None]
    relative = groups / unit  # up to 8 or so: squares can neither overflow nor vanish
    for offset in offsets:
        tried = np.clip(nominal.astype(np.int16) + offset, lowest, len(table) - 1).astype(np.uint8)
        scale = table[tried][..., None] / unit
        error = nearest(relative / scale) * scale - relative
        loss = np.einsum("rgi,rgi->rg", error, error)
        best, least = np.where(loss < least, tried, best), np.minimum(loss, least)
    return best
