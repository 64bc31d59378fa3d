"""Storage layouts of codes: two 4-bit codes a byte, the first in the low nibble."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., 2n] values of 0 … 15 -> [..., n] bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Inverse of `pack_nibbles`."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


def pack_rows(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint8]:
    """Unsigned codes [outputs, inputs], packed along the inputs: ONNX Runtime's MatMulNBits and QMoE."""
    return pack_nibbles(codes) if bits == 4 else codes


def pack_zero_rows(zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Zero points [outputs, groups] of 4-bit codes, packed along the groups as the same operators want them: whole bytes."""
    return pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))


def pack_signed_rows(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.generic]:
    """Signed codes [outputs, inputs], as ONNX stores INT4 (up to 4 bits) and INT8: two's complement, along the last axis."""
    signed = codes - np.uint8(1 << (bits - 1))  # wraps around, which is two's complement
    return pack_nibbles(signed & np.uint8(15)) if bits <= 4 else signed.view(np.int8)


def pack_columns(codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.generic]:
    """Signed codes as `pack_signed_rows`, but [inputs, outputs]."""
    return pack_signed_rows(np.ascontiguousarray(codes.T), bits=bits)
