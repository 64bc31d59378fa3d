"""Matrices that a checkpoint stores as codes and scales, read by slice as values again, or as they are.

    value[output, input] = scale[output // block[0], input // block[1]] * (code[output, input] - zero point)

One formula for all that is published: only the block differs (a whole matrix, an output, a group of inputs, a square),
and how codes are stored. Every product is computed in float32: exact for codes of at most 8 bits and 16-bit scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from corral.model.checkpoint.store import TensorInfo, TensorStore, cuts
from corral.spec.errors import InputError

CODES_PER_WORD = 8  # 4-bit codes in an int32, the first in the lowest bits
INT4_ZERO = 8


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A matrix [outputs, inputs], as the names of the tensors that hold it.

    `codes`: float8 [outputs, inputs], or (`packed`) int32 [outputs, inputs / 8] of unsigned 4-bit codes. `scales`: one for
    each `block` (outputs, inputs), as a matrix of blocks, or a single number for the whole. `zero_points`: int32
    [outputs / 8, groups], packed along the outputs; without them it is 8 for 4-bit codes and 0 for float8.
    """

    codes: str
    scales: str
    block: tuple[int, int]
    packed: bool
    zero_points: str | None = None


@dataclass(frozen=True)
class QuantizedStore:
    """A store in which each of `matrices` is one float32 tensor. Every other tensor is read as it is."""

    stored: TensorStore
    matrices: Mapping[str, QuantizedMatrix]
    tensors: Mapping[str, TensorInfo]

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """Values, float32. Raises InputError where a scale is not a positive number."""
        if name not in self.matrices:
            return self.stored.read_slice(name, where)
        matrix, (outputs, inputs) = self.matrices[name], self._cuts(name, where)
        codes, scales = self._codes(matrix, outputs, inputs), self._scales(matrix, outputs, inputs)
        values = codes.float()
        if matrix.packed:
            points = self._zero_points(matrix, outputs, inputs)
            values -= INT4_ZERO if points is None else _spread(points, 1, inputs, matrix.block[1])
        values *= _spread(_spread(scales, 0, outputs, matrix.block[0]), 1, inputs, matrix.block[1])
        return values

    def read_codes(self, name: str, where: tuple[int | slice, ...]) -> dict[str, Tensor]:
        """Codes uint8 [outputs, inputs], float32 scales [outputs, groups] and zeros uint8 alike; the slice holds whole
        groups."""
        matrix, (outputs, inputs) = self.matrices[name], self._cuts(name, where)
        group = matrix.block[1]
        if not matrix.packed or matrix.block[0] != 1 or inputs.start % group or inputs.stop % group:
            raise AssertionError(f"{name}[{where}] is not stored as whole groups of 4-bit codes")
        codes, scales = self._codes(matrix, outputs, inputs), self._scales(matrix, outputs, inputs)
        points = self._zero_points(matrix, outputs, inputs)
        return {"codes": codes, "scales": scales} | ({} if points is None else {"zeros": points})

    def _cuts(self, name: str, where: tuple[int | slice, ...]) -> tuple[range, range]:
        outputs, inputs = cuts(self.tensors[name].shape, where)
        assert isinstance(outputs, range) and isinstance(inputs, range), "single rows are never read"
        return outputs, inputs

    def _codes(self, matrix: QuantizedMatrix, outputs: range, inputs: range) -> Tensor:
        rows = slice(outputs.start, outputs.stop)
        if not matrix.packed:
            return self.stored.read_slice(matrix.codes, (rows, slice(inputs.start, inputs.stop)))
        words = self.stored.read_slice(matrix.codes, (rows, _blocks(inputs, CODES_PER_WORD)))
        return _unpack(words).narrow(1, inputs.start % CODES_PER_WORD, len(inputs))

    def _zero_points(self, matrix: QuantizedMatrix, outputs: range, inputs: range) -> Tensor | None:
        """One for each group that the slice touches; None where all are INT4_ZERO."""
        if matrix.zero_points is None:
            return None
        where = _blocks(outputs, CODES_PER_WORD), _blocks(inputs, matrix.block[1])
        words = self.stored.read_slice(matrix.zero_points, where)
        return _unpack(words.t()).t().narrow(0, outputs.start % CODES_PER_WORD, len(outputs))

    def _scales(self, matrix: QuantizedMatrix, outputs: range, inputs: range) -> Tensor:
        """float32, one for each block that the slice touches."""
        where = _blocks(outputs, matrix.block[0]), _blocks(inputs, matrix.block[1])
        if len(self.stored.tensors[matrix.scales].shape) == 2:
            scales = self.stored.read_slice(matrix.scales, where).float()
        else:
            scales = self.stored.read_slice(matrix.scales, ()).float().reshape(1, 1)
        wrong = ~(scales.isfinite() & (scales > 0))
        if wrong.any():
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise InputError(
                f"tensor {matrix.scales} holds {float(scales[row, column])} (row {row + (where[0].start or 0)}, column "
                f"{column + (where[1].start or 0)}) and {int(wrong.sum())} numbers in all that are no scales; expected "
                "finite numbers above 0. The checkpoint is damaged: download it again."
            )
        return scales


def _blocks(cut: range, block: int) -> slice:
    """The blocks that a cut touches."""
    return slice(cut.start // block, -(-cut.stop // block))


def _spread(blocks: Tensor, axis: int, cut: range, block: int) -> Tensor:
    """One value for each line of `cut` along `axis`, of values for the blocks that it touches; one block broadcasts."""
    if blocks.shape[axis] == 1 or block == 1:
        return blocks
    return blocks.repeat_interleave(block, axis).narrow(axis, cut.start % block, len(cut))


def _unpack(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 8 n]: the lowest four bits first (safetensors are little-endian, as is this host)."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # of an empty one, too
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
