"""The recipe's quantization as a pass: each big matrix W becomes DequantizeLinear(codes, scales), in graph and plan; with
asymmetric codes DequantizeLinear(codes, scales, zeros).

FP8 has one scale an output: `fp8_weight.py`.

Standard ONNX (blocked DequantizeLinear, opset 21): every target's lowering starts from it, and it runs as it is.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.embedding_table import quantize_embedding
from corral.graphs.quantize.fp8_weight import write_fp8
from corral.graphs.quantize.kinds import kind_of
from corral.graphs.quantize.methods import AS_PUBLISHED, METHODS, method_for
from corral.model.checkpoint.names import EMBEDDING
from corral.spec.errors import InputError
from corral.spec.quant_scheme import GROUP_SIZES, SCHEMES, in_words, scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Entry, step

# How a checkpoint may store weights -> the options that keep them so.
KEEPING = {
    in_words(scheme, group, asymmetric): f"--weights {scheme} --group-size {group}" + " --asymmetric" * asymmetric
    for scheme in SCHEMES
    for group in GROUP_SIZES
    for asymmetric in (False, True)
    if SCHEMES[scheme].takes_methods and (SCHEMES[scheme].takes_zero_points or not asymmetric)
}


def quantize_weights(work: ModelAndPlan) -> bool:
    """Quantize every matrix of a quantized kind; one that is published just so keeps its codes and scales.

    Raises InputError where the group size does not divide a matrix's inputs, where one is published quantized in
    another way, unless the recipe says `requantize`, and where a rule of the recipe matches no matrix.
    """
    entries = list(work.plan)
    matrices = [entry for entry in entries if kind_of(entry.weight).quantized or entry.weight == EMBEDDING]
    for rule in work.recipe.rules:
        if not any(rule.matches(entry.weight) for entry in matrices):
            raise InputError(
                f'the recipe\'s rule for "{rule.matrices}" matches no matrix that is quantized; there is, for example, '
                f"{matrices[0].weight.removesuffix('.weight')}. Correct the name, or leave the rule out."
            )
    changed = False
    for entry in entries:
        recipe = work.recipe.of(entry.weight)
        scheme = scheme_named(recipe.weights)
        if entry.weight == EMBEDDING:
            changed |= quantize_embedding(work, entry)
        elif kind_of(entry.weight).quantized and scheme.bits is not None:
            if scheme.is_float:
                _quantize_fp8(work, entry, recipe, scheme.dtype)
            else:
                _quantize(work, entry, recipe, scheme.bits, scheme.dtype)
            changed = True
        elif METHODS[work.recipe.method].rescales and kind_of(entry.weight).name in ("norm", "router"):
            rescaled = (step("rescale", statistics=work.statistics), *entry.steps)
            work.plan.replace(entry.name, dataclasses.replace(entry, steps=rescaled))
    return changed


def _quantize(work: ModelAndPlan, entry: Entry, recipe: Recipe, bits: int, dtype: str) -> None:
    if entry.steps[-1].name != "columns":
        raise PatternAbsent(f"{entry.name} is not stored [inputs, outputs]: run fold_weight_transposes before")
    group, inputs = recipe.group_size, entry.shape[-2]
    if inputs % group:
        fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        remedy = f"use --group-size {' or '.join(fitting)}" if fitting else "use --weights fp32"
        raise InputError(f"group size {group} does not divide the {inputs} inputs of {entry.name}; {remedy}.")
    method = method_for(entry.published, recipe)
    if method is AS_PUBLISHED:
        entry = dataclasses.replace(
            entry, pieces=tuple(dataclasses.replace(piece, as_stored=True) for piece in entry.pieces)
        )
    elif entry.published and not recipe.requantize:
        raise _published_otherwise(entry, recipe)
    name, how = method.step, method.arguments(bits, group, work.statistics, recipe.asymmetric)
    codes = dataclasses.replace(
        entry.with_layout(step(name, output="codes", **how), step("pack_columns", bits=bits)),
        name=f"{entry.name}.codes",
        dtype=dtype,
        cut=entry.cut if method.by_group else None,
        cut_multiple=group,
    )
    scales = dataclasses.replace(
        entry.with_layout(step(name, output="scales", **how), step("columns", dtype="float32")),
        name=f"{entry.name}.scales",
        shape=(*entry.shape[:-2], inputs // group, entry.shape[-1]),
        parameters=0,
        cut=codes.cut,
        cut_multiple=group,
    )
    zeros = dataclasses.replace(
        entry.with_layout(step(name, output="zeros", **how), step("pack_columns", bits=bits)),
        name=f"{entry.name}.zeros",
        dtype=dtype,
        shape=scales.shape,
        parameters=0,
        cut=codes.cut,
        cut_multiple=group,
    )
    weight = work.graph.initializers[entry.name]
    values = work.replace_weight(entry, codes, scales, *([zeros] if recipe.asymmetric else []))
    attributes = {"axis": len(entry.shape) - 2, "block_size": group}
    _replace(work, weight, ir.node("DequantizeLinear", values, attributes, metadata_props={SCOPE: entry.name}))


def _quantize_fp8(work: ModelAndPlan, entry: Entry, recipe: Recipe, dtype: str) -> None:
    """Codes are stored [..., outputs, inputs], as they are read: so a part of the outputs is a job, with their scales."""
    if entry.steps[-1].name != "columns":
        raise PatternAbsent(f"{entry.name} is not stored [inputs, outputs]: run fold_weight_transposes before")
    if entry.published and not recipe.requantize:
        raise _published_otherwise(entry, recipe)
    *experts, inputs, outputs = entry.shape
    codes = dataclasses.replace(
        entry.with_layout(step("e4m3", output="codes"), step("rows", dtype=dtype)),
        name=f"{entry.name}.codes",
        dtype=dtype,
        shape=(*experts, outputs, inputs),
        cut="rows",
    )
    gains = dataclasses.replace(
        entry.with_layout(step("e4m3", output="scales"), step("gains"), step("rows", dtype="float32")),
        name=f"{entry.name}.gains",
        shape=(*experts, 1, outputs) if experts else (outputs,),
        parameters=0,
        cut="rows",
    )
    weight = work.graph.initializers[entry.name]
    build = tape.Tape()
    write_fp8(build, work, *work.replace_weight(entry, codes, gains))
    for node in build.nodes:
        node.metadata_props[SCOPE] = entry.name
    _replace(work, weight, *build.nodes)


def _replace(work: ModelAndPlan, weight: ir.Value, *nodes: ir.Node) -> None:
    """Put nodes before the first use of `weight`, and the result of the last in its place."""
    users = [use.node for use in weight.uses()]
    work.graph.insert_before(users[0], nodes)
    weight.replace_all_uses_with(nodes[-1].outputs[0])


def _published_otherwise(entry: Entry, recipe: Recipe) -> InputError:
    keep = f"{KEEPING[entry.published]} to keep its codes as they are, " if entry.published in KEEPING else ""
    asked = in_words(recipe.weights, recipe.group_size, recipe.asymmetric)
    return InputError(
        f"the checkpoint stores {entry.weight} quantized already ({entry.published}), and {asked} was asked for: that would "
        f"add a second error to the first. Use {keep}--weights fp32 to store its exact values, or --requantize to quantize "
        "it again all the same."
    )
