"""How the parts of a `FloatWeight` (codes, scales of groups, gains) are made of what a quantizer gives, by recipe."""

from __future__ import annotations

from dataclasses import dataclass

from corral.graphs.quantize.methods import METHODS
from corral.spec.errors import InputError
from corral.spec.quant_scheme import GROUP_SIZES, scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Entry, Step, step


@dataclass(frozen=True, kw_only=True)
class Form:
    """The steps of each part, and which results of the quantizer they begin with."""

    quantizer: Step
    codes: Step  # their layout
    by_output: bool = True  # whether a part of the outputs can be quantized by itself
    group: int = 0  # inputs that share a scale
    group_dtype: str = "float32"
    groups_from: str = "scales"  # the quantizer's output
    groups: tuple[Step, ...] = ()  # from there to groups' scales
    outputs: tuple[Step, ...] = ()  # from "scales" to one an output


def form_of(entry: Entry, recipe: Recipe, statistics: str) -> Form:
    """The form that a matrix takes by its recipe (`Recipe.of`). Raises InputError where groups do not divide its inputs."""
    scheme = scheme_named(recipe.weights)
    if not scheme.is_float:
        check_group(entry, recipe.group_size)
        method = METHODS[recipe.method]
        assert scheme.bits is not None
        return Form(
            quantizer=step(method.step, output="", **method.arguments(scheme.bits, recipe.group_size, statistics)),
            codes=step("pack_signed_rows", bits=scheme.bits),
            by_output=method.by_group,
            group=recipe.group_size,
            groups=(step("group_scales"),),
            outputs=(step("output_scales"),),
        )
    if not scheme.block_size:
        return Form(quantizer=step("e4m3"), codes=step("rows", dtype=scheme.dtype))
    if entry.shape[-2] % scheme.block_size:
        raise InputError(
            f"{scheme.name} has blocks of {scheme.block_size}, which do not divide the {entry.shape[-2]} inputs of "
            f"{entry.name}; store it otherwise, by a rule or by other --weights."
        )
    return Form(
        quantizer=step(scheme.name, method=recipe.method),
        codes=step("pack_rows", bits=4),
        group=scheme.block_size,
        group_dtype="float8e4m3fn",
        groups_from="blocks",
    )


def check_group(entry: Entry, group: int) -> None:
    """Raise InputError, with a remedy, unless groups of so many divide the inputs of a matrix [..., inputs, outputs]."""
    inputs = entry.shape[-2]
    if inputs % group:
        fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        remedy = f"use --group-size {' or '.join(fitting)}" if fitting else "use --weights fp32"
        raise InputError(f"group size {group} does not divide the {inputs} inputs of {entry.name}; {remedy}.")
