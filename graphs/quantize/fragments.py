"""Storage layout of weights for tensor cores: tiles of 16 outputs by 64 inputs, as the lanes of a warp hold them.

The kernels of `graphs/engine/kernels` read it; grouped_product.cuh describes it. One tile is 512 bytes at 4 bits a
weight, 1024 at 8, 2048 at 16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from corral.graphs.quantize.pack import pack_nibbles
from corral.spec.errors import InputError

TILE_OUTPUTS = 16
TILE_INPUTS = 64

# An output is 16 * tile + 8 * upper + g, an input 64 * step + 16 * t + 8 * j1 + 4 * j0 + 2 * p + i; lane = 4 * g + t.
AXES = {"tile": -1, "upper": 2, "g": 8, "step": -1, "t": 4, "j1": 2, "j0": 2, "p": 2, "i": 2}
# Slowest to fastest, by bits a weight. For int4 the last eight are the nibbles of a 32-bit word, lowest first.
ORDER = {
    4: ("tile", "step", "g", "t", "j1", "j0", "i", "p", "upper"),
    8: ("tile", "step", "j1", "g", "t", "j0", "p", "i", "upper"),
    16: ("tile", "step", "j1", "j0", "g", "t", "p", "upper", "i"),
}


def pack_fragments(matrix: NDArray[np.generic], *, bits: int) -> NDArray[np.generic]:
    """[outputs, inputs] -> [outputs / 16, inputs / 64, elements of a tile], in the order of `ORDER[bits]`.

    At 4 bits: codes 0 … 15, stored two a byte (512 bytes a tile). At 8: bytes. At 16: stored as float16; raises
    InputError where a value does not fit.
    """
    outputs, inputs = matrix.shape
    if outputs % TILE_OUTPUTS or inputs % TILE_INPUTS:
        raise AssertionError(f"[{outputs}, {inputs}] is not made of tiles of {TILE_OUTPUTS} by {TILE_INPUTS}")
    tiles, steps = outputs // TILE_OUTPUTS, inputs // TILE_INPUTS
    names = list(AXES)
    split = matrix.reshape([{"tile": tiles, "step": steps}.get(name, AXES[name]) for name in names])
    ordered = split.transpose([names.index(name) for name in ORDER[bits]]).reshape(tiles, steps, -1)
    if bits == 4:
        return pack_nibbles(ordered)
    return ordered if bits == 8 else _as_float(ordered, "float16")


def fragment_scales(scales: NDArray[np.float32], *, dtype: str) -> NDArray[np.generic]:
    """[outputs, groups] -> [outputs / 16, groups, 8, 2]: the two outputs that a lane has in hand lie together.

    Raises InputError where a scale does not fit `dtype`.
    """
    outputs, groups = scales.shape
    if outputs % TILE_OUTPUTS:
        raise AssertionError(f"{outputs} outputs are not made of tiles of {TILE_OUTPUTS}")
    return _as_float(scales.reshape(-1, 2, 8, groups).transpose(0, 3, 2, 1), dtype)


def _as_float(values: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        largest = float(np.abs(values.astype(np.float64)).max())
        raise InputError(
            f"a weight or scale of magnitude {largest:.3g} does not fit {dtype}, whose largest value is "
            f"{float(np.finfo(dtype).max):.6g}: the checkpoint is damaged, or needs a recipe with fp32 or bf16 weights."
        )
    return stored
