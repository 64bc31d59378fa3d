"""FP8 in both operands of a matrix product, its gains after it.

    MatMul(x, Mul(Transpose(DequantizeLinear(codes)), gains))
        -> Mul(MatMul(DequantizeLinear(QuantizeLinear(x)), Transpose(DequantizeLinear(codes))), gains)

TensorRT takes the nodes around a product as one FP8 kernel, which reads the codes in either order. The scale of x is the largest magnitude that
calibration saw, as the format's largest number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.e4m3 import LARGEST

if TYPE_CHECKING:
    from collections.abc import Sequence


def lower_fp8_matmul(work: ModelAndPlan) -> bool:
    """Rewrite every product with an FP8 matrix outside the experts."""
    changed = False
    for node in work.nodes("MatMul"):
        split = split_gains(work, node.inputs[1])
        if split is None:
            continue
        build = tape.Tape()
        codes, gains = split
        x = quantized(build, work, node.inputs[0], node.metadata_props.get(SCOPE, ""))
        y = build.op("Mul", [build.op("MatMul", [x, codes]), gains])
        work.replace_node(node, build.nodes, [y])
        changed = True
    return changed


def split_gains(work: ModelAndPlan, weight: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The dequantized codes [..., inputs, outputs] and the gains of an FP8 weight; None for any other value."""
    multiply = weight.producer() if weight is not None else None
    if multiply is None or multiply.op_type != "Mul":
        return None
    codes, gains = multiply.inputs
    entry = work.entry_of(gains)
    return (codes, gains) if codes and gains and entry and entry.steps[0].name == "e4m3" else None


def quantized(build: tape.Tape, work: ModelAndPlan, x: ir.Value | None, name: str) -> ir.Value:
    """x rounded to FP8 by the range that calibration saw at `name`."""
    if name not in work.activation_ranges:
        raise PatternAbsent(f"calibration saw no input of {name}")
    scale = np.float16(max(work.activation_ranges[name], 1e-3) / LARGEST)
    value = work.constant(ir.tensor(np.array(scale, np.float32), name=f"{name}.range"))
    zero = work.constant(ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="fp8_zero"))
    operands: Sequence[ir.Value | None] = [x, value, zero]
    return build.op("DequantizeLinear", [build.op("QuantizeLinear", operands), value])
