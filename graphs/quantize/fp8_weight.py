"""An FP8 weight in the graph: how the quantizer writes it, and how lowerings find it again.

    Mul(Transpose(DequantizeLinear(codes, 2^-12)), gains)      [..., inputs, outputs]

Codes [..., outputs, inputs] are float8_e4m3fn, gains [..., outputs] what is left of each output's scale (`e4m3.gains`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.e4m3 import BASE
from corral.spec.weight_plan import Entry


@dataclass(frozen=True)
class Fp8Weight:
    """Both entries, and the values that a product takes in: dequantized codes, and gains."""

    codes: Entry
    gains: Entry
    dequantized: ir.Value
    gain: ir.Value


def write_fp8(build: tape.Tape, work: ModelAndPlan, codes: ir.Value, gain: ir.Value) -> ir.Value:
    """The nodes that make a weight of its codes and gains."""
    base = work.constant(ir.tensor(np.array(BASE, np.float32), name="fp8_base"))
    assert codes.shape is not None
    *front, outputs, inputs = range(len(codes.shape))
    transposed = build.op(
        "Transpose", [build.op("DequantizeLinear", [codes, base])], {"perm": [*front, inputs, outputs]}
    )
    return build.op("Mul", [transposed, gain])


def find_fp8(work: ModelAndPlan, value: ir.Value | None) -> Fp8Weight | None:
    """The FP8 weight behind a value, or None where it is not one."""
    multiply = value.producer() if value is not None else None
    if multiply is None or multiply.op_type != "Mul":
        return None
    transposed, gain = multiply.inputs
    gains = work.entry_of(gain)
    if transposed is None or gain is None or gains is None or gains.steps[0].name != "e4m3":
        return None
    transpose = transposed.producer()
    dequantized = transpose.inputs[0] if transpose is not None else None
    dequantize = dequantized.producer() if dequantized is not None else None
    codes = work.entry_of(dequantize.inputs[0]) if dequantize is not None else None
    assert dequantized is not None and codes is not None, f"{gains.name} belongs to no FP8 weight"
    return Fp8Weight(codes, gains, dequantized, gain)
