"""An FP8 or NVFP4 weight in the graph: how the quantizer writes it, and how lowerings find it again.

    Mul(Transpose(DequantizeLinear(codes, 2^-12)), gains)                                    [..., inputs, outputs]
    Mul(Transpose(DequantizeLinear(codes, DequantizeLinear(blocks, 2^-12))), gains)

Codes [..., outputs, inputs] are float8_e4m3fn, or float4_e2m1fn with float8_e4m3fn scales [..., outputs, inputs / 16] of
blocks; gains [..., outputs] are what is left of each output's scale (`e4m3.gains`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.e2m1 import NVFP4_BLOCK
from corral.graphs.quantize.e4m3 import BASE
from corral.spec.weight_plan import Entry

QUANTIZERS = ("e4m3", "nvfp4")  # the steps that make such weights


@dataclass(frozen=True)
class FloatWeight:
    """The entries, `blocks` of NVFP4 alone, and the values that a product takes in: dequantized codes, and gains."""

    codes: Entry
    blocks: Entry | None
    gains: Entry
    dequantized: ir.Value
    gain: ir.Value

    @property
    def entries(self) -> tuple[Entry, ...]:
        """In the order of `write_float`."""
        return (self.codes, *([self.blocks] if self.blocks else []), self.gains)


def write_float(build: tape.Tape, work: ModelAndPlan, codes: ir.Value, *scales: ir.Value) -> ir.Value:
    """The nodes that make a weight of its codes, its blocks' scales where it has some, and its gains."""
    *blocks, gain = scales
    scale = work.constant(ir.tensor(np.array(BASE, np.float32), name="float_base"))
    assert codes.shape is not None
    *front, outputs, inputs = range(len(codes.shape))
    how = {}
    if blocks:
        scale = build.op("DequantizeLinear", [*blocks, scale])
        how = {"axis": inputs, "block_size": NVFP4_BLOCK}
    dequantized = build.op("DequantizeLinear", [codes, scale], how)
    return build.op("Mul", [build.op("Transpose", [dequantized], {"perm": [*front, inputs, outputs]}), gain])


def find_float(work: ModelAndPlan, value: ir.Value | None) -> FloatWeight | None:
    """The FP8 or NVFP4 weight behind a value, or None where it is not one."""
    multiply = _made_by("Mul", value)
    gain = multiply.inputs[1] if multiply else None
    gains = work.entry_of(gain)
    if multiply is None or gain is None or gains is None or gains.steps[0].name not in QUANTIZERS:
        return None
    transpose = _made_by("Transpose", multiply.inputs[0])
    dequantize = _made_by("DequantizeLinear", transpose.inputs[0]) if transpose else None
    assert dequantize is not None, f"{gains.name} belongs to no weight"
    codes, scaled = work.entry_of(dequantize.inputs[0]), _made_by("DequantizeLinear", dequantize.inputs[1])
    assert codes is not None, f"{gains.name} belongs to no codes"
    blocks = work.entry_of(scaled.inputs[0]) if scaled else None
    return FloatWeight(codes, blocks, gains, dequantize.outputs[0], gain)


def _made_by(operator: str, value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, where it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None
