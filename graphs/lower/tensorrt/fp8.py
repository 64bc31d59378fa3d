"""FP8 in both operands of a matrix product, its gains after it.

    MatMul(x, Mul(Transpose(DequantizeLinear(codes)), gains))
        -> Mul(MatMul(DequantizeLinear(QuantizeLinear(x)), Transpose(DequantizeLinear(codes))), gains)

TensorRT takes the nodes around a product as one FP8 kernel, which reads the codes as they lie, [outputs, inputs]; int4 codes
become FP8 in memory before. The
scale of x is one number, planned like any weight: the largest magnitude that a calibration text shows there, as the
format's largest number. Experts of a layer share it, so that what one sees of a text serves all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.planned_tensor import planned_initializer
from corral.graphs.calibrate.statistics import input_site
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.float_weight import FloatWeight, find_float, fp8_zero
from corral.spec.weight_plan import Entry, step

if TYPE_CHECKING:
    from collections.abc import Sequence


def lower_fp8_matmul(work: ModelAndPlan) -> bool:
    """Rewrite every product with an FP8 matrix outside the experts."""
    changed = False
    for node in work.nodes("MatMul"):
        weight = find_float(work, node.inputs[1])
        if weight is None or not weight.rounds_inputs:
            continue
        build = tape.Tape()
        y = fp8_product(build, work, node.inputs[0], weight)
        work.replace_node(node, build.nodes, [y])
        changed = True
    return changed


def fp8_product(
    build: tape.Tape, work: ModelAndPlan, x: ir.Value | None, weight: FloatWeight, *, axes: Sequence[int] = (1, 0)
) -> ir.Value:
    """x [..., K] times codes [..., N, K], whose transposition is `axes`, times gains."""
    scale = _input_scale(work, weight.codes)
    rounded = build.op("DequantizeLinear", [build.op("QuantizeLinear", [x, scale, fp8_zero(work)]), scale])
    product = build.op("MatMul", [rounded, build.op("Transpose", [weight.dequantized], {"perm": axes})])
    return build.op("Mul", [product, weight.gain])


def _input_scale(work: ModelAndPlan, codes: Entry) -> ir.Value:
    """Into the plan, behind the codes: one number, which follows from the statistics and not from the row that is read.

    One for all that reads the same: the tiles of a matrix share theirs.
    """
    name = f"{input_site(codes.weight.partition('+')[0])}.input_scale"
    if name in work.plan.entries:
        return work.graph.initializers[name]
    first = codes.pieces[0]
    start, _ = first.rows
    entry = dataclasses.replace(
        codes,
        name=name,
        dtype="float32",
        shape=(),
        pieces=(dataclasses.replace(first, rows=(start, start + 1), interleave=0),),
        steps=(step("input_scale", statistics=work.statistics), step("rows", dtype="float32")),
        parameters=0,
        cut=None,
    )
    work.plan.replace(codes.name, codes, entry)
    value = planned_initializer(entry)
    work.graph.register_initializer(value)
    return value
