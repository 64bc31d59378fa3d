"""The recipe's quantization as a pass: each big matrix W becomes DequantizeLinear(codes, scales), in graph and plan.

FP8 has one scale an output and becomes Mul(DequantizeLinear(codes, constant), gains).

Standard ONNX (blocked DequantizeLinear, opset 21): every target's lowering starts from it, and it runs as it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.fp8 import BASE
from corral.graphs.quantize.kinds import kind_of
from corral.spec.errors import InputError
from corral.spec.quant_scheme import GROUP_SIZES, scheme_named
from corral.spec.weight_plan import Entry, step


def quantize_weights(work: ModelAndPlan) -> bool:
    """Quantize every matrix of a quantized kind. Raises InputError where the group size does not divide its inputs."""
    scheme = scheme_named(work.recipe.weights)
    if scheme.bits is None:
        return False
    for entry in list(work.plan):
        if kind_of(entry.weight).quantized and scheme.is_float:
            _quantize_fp8(work, entry, scheme.dtype)
        elif kind_of(entry.weight).quantized:
            _quantize(work, entry, scheme.bits, scheme.dtype)
    return True


def _quantize(work: ModelAndPlan, entry: Entry, bits: int, dtype: str) -> None:
    if entry.steps[-1].name != "columns":
        raise PatternAbsent(f"{entry.name} is not stored [inputs, outputs]: run fold_weight_transposes before")
    group, inputs = work.recipe.group_size, entry.shape[-2]
    if inputs % group:
        fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        remedy = f"use --group-size {' or '.join(fitting)}" if fitting else "use --weights fp32"
        raise InputError(f"group size {group} does not divide the {inputs} inputs of {entry.name}; {remedy}.")
    rtn = {"bits": bits, "group_size": group}
    codes = dataclasses.replace(
        entry.with_layout(step("rtn", output="codes", **rtn), step("pack_columns", bits=bits)),
        name=f"{entry.name}.codes",
        dtype=dtype,
        cut_multiple=group,
    )
    scales = dataclasses.replace(
        entry.with_layout(step("rtn", output="scales", **rtn), step("columns", dtype="float32")),
        name=f"{entry.name}.scales",
        shape=(*entry.shape[:-2], inputs // group, entry.shape[-1]),
        parameters=0,
        cut_multiple=group,
    )
    weight = work.graph.initializers[entry.name]
    values = work.replace_weight(entry, codes, scales)
    attributes = {"axis": len(entry.shape) - 2, "block_size": group}
    _replace(work, weight, ir.node("DequantizeLinear", values, attributes, metadata_props={SCOPE: entry.name}))


def _quantize_fp8(work: ModelAndPlan, entry: Entry, dtype: str) -> None:
    if entry.steps[-1].name != "columns":
        raise PatternAbsent(f"{entry.name} is not stored [inputs, outputs]: run fold_weight_transposes before")
    codes = dataclasses.replace(
        entry.with_layout(step("fp8", output="codes"), step("columns", dtype=dtype)),
        name=f"{entry.name}.codes",
        dtype=dtype,
        cut=None,  # an output's gain depends on all its inputs
    )
    gains = dataclasses.replace(
        entry.with_layout(step("fp8", output="gains"), step("columns", dtype="float32")),
        name=f"{entry.name}.gains",
        shape=(*entry.shape[:-2], 1, entry.shape[-1]),
        parameters=0,
        cut=None,
    )
    weight = work.graph.initializers[entry.name]
    stored, gain = work.replace_weight(entry, codes, gains)
    base = work.constant(ir.tensor(np.array(BASE, np.float32), name="fp8_base"))
    names = {SCOPE: entry.name}
    dequantize = ir.node("DequantizeLinear", [stored, base], metadata_props=names)
    _replace(work, weight, dequantize, ir.node("Mul", [dequantize.outputs[0], gain], metadata_props=dict(names)))


def _replace(work: ModelAndPlan, weight: ir.Value, *nodes: ir.Node) -> None:
    """Put nodes before the first use of `weight`, and the result of the last in its place."""
    users = [use.node for use in weight.uses()]
    work.graph.insert_before(users[0], nodes)
    weight.replace_all_uses_with(nodes[-1].outputs[0])
