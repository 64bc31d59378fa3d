"""FP8 in both operands of a matrix product, its gains after it.

    MatMul(x, Mul(Transpose(DequantizeLinear(codes)), gains))
        -> Mul(MatMul(DequantizeLinear(QuantizeLinear(x)), Transpose(DequantizeLinear(codes))), gains)

TensorRT takes the nodes around a product as one FP8 kernel, which reads the codes as they lie, [outputs, inputs]. The
scale of x is the largest magnitude that calibration saw, as the format's largest number.
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

SMALLEST = 1e-3  # a range: so that its scale is a normal number of float16


def lower_fp8_matmul(work: ModelAndPlan) -> bool:
    """Rewrite every product with an FP8 matrix outside the experts."""
    changed = False
    for node in work.nodes("MatMul"):
        weight = fp8_weight(work, node.inputs[1])
        if weight is None:
            continue
        build = tape.Tape()
        y = fp8_product(build, work, node.inputs[0], weight, name=node.metadata_props.get(SCOPE, ""))
        work.replace_node(node, build.nodes, [y])
        changed = True
    return changed


def fp8_weight(work: ModelAndPlan, weight: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The dequantized codes [..., outputs, inputs] and the gains [..., 1, outputs] of an FP8 weight, None of any other."""
    multiply = weight.producer() if weight is not None else None
    if multiply is None or multiply.op_type != "Mul":
        return None
    transposed, gains = multiply.inputs
    entry = work.entry_of(gains)
    if transposed is None or gains is None or entry is None or entry.steps[0].name != "e4m3":
        return None
    transpose = transposed.producer()
    assert transpose is not None and transpose.inputs[0] is not None
    return transpose.inputs[0], gains


def fp8_product(
    build: tape.Tape,
    work: ModelAndPlan,
    x: ir.Value | None,
    weight: tuple[ir.Value, ir.Value],
    *,
    name: str,
    axes: Sequence[int] = (1, 0),
) -> ir.Value:
    """x [..., K] times codes [..., N, K], whose transposition is `axes`, times gains; `name` is x's in the calibration."""
    codes, gains = weight
    product = build.op("MatMul", [_rounded(build, work, x, name), build.op("Transpose", [codes], {"perm": axes})])
    return build.op("Mul", [product, gains])


def _rounded(build: tape.Tape, work: ModelAndPlan, x: ir.Value | None, name: str) -> ir.Value:
    """x rounded to FP8 by the range that calibration saw at `name`."""
    try:
        largest = work.activation_ranges[name]
    except KeyError:
        raise PatternAbsent(f"calibration saw no input of {name}") from None
    scale = np.float16(max(largest, SMALLEST) / LARGEST)
    value = work.constant(ir.tensor(np.array(scale, np.float32), name=f"{name}.range"))
    zero = work.constant(ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="fp8_zero"))
    operands: Sequence[ir.Value | None] = [x, value, zero]
    return build.op("DequantizeLinear", [build.op("QuantizeLinear", operands), value])
