"""MatMul(x, DequantizeLinear(codes, scales)) -> com.microsoft.MatMulNBits, on the CPU with int8 activations."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.lower.onnxruntime.contrib import CONTRIB, accuracy_level, import_contrib
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.quantized_weight import QuantizedWeight, find_quantized
from corral.spec.weight_plan import step


def lower_matmul(work: ModelAndPlan) -> bool:
    """Lower every matrix product with a quantized weight. Raises PatternAbsent where a dequantized weight is left."""
    changed = False
    import_contrib(work)
    for node in work.nodes("MatMul"):
        weight = find_quantized(work, node.inputs[1])
        if weight is None:
            continue
        build = tape.Tape()
        y = build.op(
            "MatMulNBits",
            [node.inputs[0], *_stored(work, weight)],
            {
                "K": weight.codes.shape[0],
                "N": weight.codes.shape[1],
                "bits": weight.bits,
                "block_size": weight.group_size,
                "accuracy_level": accuracy_level(work),
            },
            domain=CONTRIB,
        )
        work.replace_node(node, build.nodes, [y])
        changed = True
    if left := [node.name for node in work.nodes("DequantizeLinear") if node.outputs[0].uses()]:
        raise PatternAbsent(f"{len(left)} dequantized weights are not multiplied by MatMul, {left[0]} first")
    return changed


def _stored(work: ModelAndPlan, weight: QuantizedWeight) -> list[ir.Value]:
    inputs, outputs = weight.codes.shape
    groups = inputs // weight.group_size
    codes = dataclasses.replace(
        weight.codes.with_layout(step("pack_rows", bits=weight.bits)),
        dtype="uint8",
        shape=(outputs, groups, weight.group_size * weight.bits // 8),
        cut="rows",
        cut_multiple=1,
    )
    scales = dataclasses.replace(
        weight.scales.with_layout(step("rows", dtype="float32")), shape=(outputs, groups), cut="rows", cut_multiple=1
    )
    zeros = weight.zeros and dataclasses.replace(
        weight.zeros.with_layout(step("pack_zero_rows")),
        dtype="uint8",
        shape=(outputs, (groups + 1) // 2),
        cut="rows",
        cut_multiple=1,
    )
    return weight.store(work, codes, scales, zeros)
