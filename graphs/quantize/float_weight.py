"""A weight of small floating-point numbers: how the quantizer writes it in the graph, and how lowerings find it again.

    Mul(Transpose(DQ(codes, 2^-12)), gains)                         FP8            [..., inputs, outputs]
    Mul(Transpose(DQ(Q(DQ(codes, groups), 2^-12))), gains)          W4A8: int4 codes become FP8 numbers on the way
    Mul(Transpose(DQ(codes, DQ(groups, 2^-12))), gains)             NVFP4

Q and DQ are QuantizeLinear and DequantizeLinear. Codes are stored [..., outputs, inputs], scales of groups of inputs [...,
outputs, inputs / group]; gains [..., outputs] are what is left of each output's scale (`e4m3.gains`).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.model_and_plan import ModelAndPlan, made_by
from corral.graphs.quantize.e4m3 import BASE
from corral.spec.weight_plan import Entry


@dataclass(frozen=True)
class FloatWeight:
    """The entries, `groups` not of FP8, and the values that a product takes in: dequantized codes, and gains."""

    codes: Entry
    groups: Entry | None
    gains: Entry
    dequantized: ir.Value
    gain: ir.Value

    @property
    def entries(self) -> tuple[Entry, ...]:
        """In the order of `write_float`."""
        return (self.codes, *([self.groups] if self.groups else []), self.gains)

    @property
    def rounds_inputs(self) -> bool:
        """Whether products read FP8 twice; NVFP4 is storage."""
        return self.codes.dtype != "float4e2m1"


def write_float(build: tape.Tape, work: ModelAndPlan, codes: ir.Value, *scales: ir.Value) -> ir.Value:
    """The nodes that make a weight of its codes, its groups' scales where it has some, and its gains."""
    *groups, gain = scales
    base = work.constant(ir.tensor(np.array(BASE, np.float32), name="float_base"))
    assert codes.shape is not None
    *front, outputs, inputs = range(len(codes.shape))
    if groups:
        by_group = {"axis": inputs, "block_size": _inputs(codes) // _inputs(groups[0])}
        if codes.dtype == ir.DataType.INT4:
            values = build.op("DequantizeLinear", [codes, *groups], by_group)
            rounded = build.op("QuantizeLinear", [values, base, fp8_zero(work)])
            dequantized = build.op("DequantizeLinear", [rounded, base])
        else:
            dequantized = build.op("DequantizeLinear", [codes, build.op("DequantizeLinear", [*groups, base])], by_group)
    else:
        dequantized = build.op("DequantizeLinear", [codes, base])
    return build.op("Mul", [build.op("Transpose", [dequantized], {"perm": [*front, inputs, outputs]}), gain])


def find_float(work: ModelAndPlan, value: ir.Value | None) -> FloatWeight | None:
    """Such a weight behind a value, or None where it is not one."""
    multiply = made_by(value, "Mul")
    gain = multiply.inputs[1] if multiply else None
    gains = work.entry_of(gain)
    if multiply is None or gain is None or gains is None or not any(step.name == "gains" for step in gains.steps):
        return None
    transpose = made_by(multiply.inputs[0], "Transpose")
    last = made_by(transpose.inputs[0], "DequantizeLinear") if transpose else None
    rounded = made_by(last.inputs[0], "QuantizeLinear") if last else None
    first = made_by(rounded.inputs[0], "DequantizeLinear") if rounded else last
    codes = work.entry_of(first.inputs[0]) if first else None
    assert last is not None and first is not None and codes is not None, f"{gains.name} belongs to no codes"
    scales = made_by(first.inputs[1], "DequantizeLinear")
    groups = work.entry_of(scales.inputs[0] if scales else first.inputs[1])
    return FloatWeight(codes, groups, gains, last.outputs[0], gain)


def fp8_zero(work: ModelAndPlan) -> ir.Value:
    """The zero point that tells QuantizeLinear the type of its result."""
    return work.constant(ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="fp8_zero"))


def _inputs(value: ir.Value) -> int:
    """The size of a weight's last axis."""
    size = value.shape[-1] if value.shape is not None else None
    assert isinstance(size, int)
    return size
