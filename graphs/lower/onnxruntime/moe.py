"""corral::MoE -> com.microsoft.QMoE (int4, int8) or com.microsoft.MoE (float32).

    x * sigmoid(max logit) -> QMoE(k=1, normalized routing weights, so that the chosen expert's weight is 1)

Exactly Llama 4's routed half for one expert per token. For k > 1 each of the k choices scales the input differently, so
there is one such node a choice, routed by a one-hot row, and their sum. In 16 bits (CUDA) one expert is chosen so, too:
rounded, two logits may be equal that were not.

Both operators want expert matrices [outputs, inputs], gate and up rows interleaved, and their SwiGLU constants spelled
out: the defaults are another model's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.ops.custom_op import DOMAIN
from corral.exporter.ops.moe import NAME
from corral.graphs.lower.onnxruntime.contrib import CONTRIB, accuracy_level, import_contrib
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.quantized_weight import QuantizedWeight, find_quantized
from corral.spec.errors import InputError
from corral.spec.target import target_named
from corral.spec.weight_plan import Entry, step

SWIGLU: dict[str, int | float | str] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": 1e30,
    "normalize_routing_weights": 1,
    "k": 1,
}
NO_THIRD_MATRIX = (None, None, None)  # codes, scales and bias that other models' experts have


def lower_moe(work: ModelAndPlan) -> bool:
    """Lower every MoE layer. Raises PatternAbsent unless there is one node per MoE layer."""
    nodes = list(work.nodes(NAME, DOMAIN))
    expected = sum(layer.moe for layer in work.config.layers)
    if len(nodes) != expected:
        raise PatternAbsent(f"lower_moe found {len(nodes)} corral::MoE, expected {expected}")
    import_contrib(work)
    for node in nodes:
        build = tape.Tape()
        y = _routed(build, work, node)
        work.replace_node(node, build.nodes, [y])
    return bool(nodes)


def _routed(build: tape.Tape, work: ModelAndPlan, node: ir.Node) -> ir.Value:
    x, logits, gate_up, down = node.inputs
    assert x and logits and gate_up and down
    k = node.attributes["k"].as_int()
    experts = _Experts(work, gate_up, down)
    last = work.constant(ir.tensor(np.array([-1]), name="last_axis"))
    if k == 1 and target_named(work.recipe.target).kv_dtype == "float32":
        return experts.visit(build, x, build.op("ReduceMax", [logits, last], {"keepdims": 1}), logits)
    how_many = work.constant(ir.tensor(np.array([k]), name="experts_per_token"))
    top, chosen = build.op_multi_out("TopK", [logits, how_many], {"axis": -1}, num_outputs=2)
    numbers = work.constant(ir.tensor(np.arange(work.config.num_local_experts), name="expert_numbers"))
    total: ir.Value | None = None
    for choice in range(k):
        this = work.constant(ir.tensor(np.array([choice]), name=f"choice_{choice}"))
        logit, expert = (build.op("Gather", [values, this], {"axis": -1}) for values in (top, chosen))
        one_hot = build.op("Cast", [build.op("Equal", [expert, numbers])], {"to": ir.DataType.FLOAT})
        answer = experts.visit(build, x, logit, one_hot)
        total = answer if total is None else build.op("Add", [total, answer])
    assert total is not None
    return total


class _Experts:
    """The two weights of a layer's experts, stored as the operator wants them."""

    def __init__(self, work: ModelAndPlan, gate_up: ir.Value, down: ir.Value) -> None:
        self.work = work
        quantized = find_quantized(work, gate_up), find_quantized(work, down)
        self.op = "MoE"
        self.attributes: dict[str, int | float | str] = dict(SWIGLU)
        if len({weight and (weight.bits, weight.group_size, weight.zeros is None) for weight in quantized}) > 1:
            raise InputError(
                f"{gate_up.name} and {down.name}, of the same experts, are stored with different weights, group sizes or zero "
                "points, and ONNX Runtime's kernel wants them alike. Let one rule of the recipe match both."
            )
        if quantized[0] and quantized[1]:
            self.op = "QMoE"
            self.attributes |= {
                "expert_weight_bits": quantized[0].bits,
                "block_size": quantized[0].group_size,
                "accuracy_level": accuracy_level(work),
            }
            if target_named(work.recipe.target).provider == "cuda":
                self.attributes["weights_prepacked"] = (
                    0  # as here; by default CUDA expects CUTLASS's order of the bytes
                )
            into = _stored_quantized(work, quantized[0], interleave=True)
            back = _stored_quantized(work, quantized[1], interleave=False)
            self.weights = [*into[:2], None, *back[:2], None]
            if zeros := [*into[2:], *back[2:]]:
                self.weights += [*NO_THIRD_MATRIX, *zeros]
        else:
            self.weights = [_stored_float(work, gate_up, True), None, _stored_float(work, down, False), None]

    def visit(self, build: tape.Tape, x: ir.Value, logit: ir.Value, routing: ir.Value) -> ir.Value:
        """expert(sigmoid(logit) * x) for the expert that each row of `routing` [..., E] is largest for."""
        experts = self.work.config.num_local_experts
        table = self.work.constant(ir.tensor(np.array([-1, experts]), name="routing_rows"))
        scaled = build.op("Mul", [x, build.op("Sigmoid", [logit])])
        rows = build.op("Reshape", [routing, table])
        return build.op(self.op, [scaled, rows, *self.weights], self.attributes, domain=CONTRIB)


def _stored_quantized(work: ModelAndPlan, weight: QuantizedWeight, *, interleave: bool) -> list[ir.Value]:
    experts, inputs, outputs = weight.codes.shape
    codes = dataclasses.replace(
        _by_outputs(weight.codes, interleave),
        steps=(*weight.codes.steps[:-1], step("pack_rows", bits=weight.bits)),
        dtype="uint8",
        shape=(experts, outputs, inputs * weight.bits // 8),
    )
    scales = dataclasses.replace(
        _by_outputs(weight.scales, interleave), shape=(experts, outputs, inputs // weight.group_size)
    )
    zeros = weight.zeros and dataclasses.replace(
        _by_outputs(weight.zeros, interleave).with_layout(step("pack_zero_rows")),
        dtype="uint8",
        shape=(experts, outputs, (inputs // weight.group_size + 1) // 2),
    )
    return weight.store(work, codes, scales, zeros)


def _stored_float(work: ModelAndPlan, value: ir.Value, interleave: bool) -> ir.Value:
    entry = work.entry_of(value)
    if entry is None:
        raise PatternAbsent(f"{value.name} is not a planned weight")
    experts, inputs, outputs = entry.shape
    stored = dataclasses.replace(_by_outputs(entry, interleave), shape=(experts, outputs, inputs))
    return work.replace_weight(entry, stored)[0]


def _by_outputs(entry: Entry, interleave: bool) -> Entry:
    """`entry` as float rows, one an output; gate and up rows alternate where they are interleaved."""
    pieces = tuple(dataclasses.replace(piece, interleave=int(interleave)) for piece in entry.pieces)
    return entry.with_layout(step("rows", dtype="float32"), pieces=pieces, cut="rows", cut_multiple=1 + interleave)
