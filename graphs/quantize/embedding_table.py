"""The embedding table in int8 or int4, where a recipe's rule says so: no graph reads it, so only the plan changes.

Each row is quantized in groups along the hidden size. The runtime gathers rows and dequantizes these alone.
"""

from __future__ import annotations

import dataclasses

from corral.exporter.bind_weights import EMBEDDING_SCALES
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.methods import METHODS
from corral.model.checkpoint.names import EMBEDDING
from corral.spec.errors import InputError
from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Entry, step

TABLE_WEIGHTS = ("int8", "int4")  # that the runtime reads a row of
SEARCHED = "rtn-mse"  # in place of calibrated methods: a table has no inputs whose statistics could say anything


def quantize_embedding(work: ModelAndPlan, entry: Entry) -> bool:
    """Plan codes and scales for the table, where a rule names it. Raises InputError for a group that does not divide it."""
    if not any(rule.weights and rule.matches(EMBEDDING) for rule in work.recipe.rules):
        return False  # stored as published
    recipe = work.recipe.of(EMBEDDING)
    bits, hidden = scheme_named(recipe.weights).bits, entry.shape[1]
    if bits is None:
        return False
    _check(entry, recipe, hidden)
    method = METHODS[SEARCHED if METHODS[recipe.method].calibrated else recipe.method]
    how = method.arguments(bits, recipe.group_size, "")
    codes = dataclasses.replace(
        entry.with_layout(step(method.step, output="codes", **how), step("pack_rows", bits=bits)),
        dtype="uint8",
        shape=(entry.shape[0], hidden * bits // 8),
    )
    scales = dataclasses.replace(
        entry.with_layout(step(method.step, output="scales", **how), step("rows", dtype="float32")),
        name=EMBEDDING_SCALES,
        dtype="float32",
        shape=(entry.shape[0], hidden // recipe.group_size),
        parameters=0,
    )
    work.plan.replace(entry.name, codes, scales)
    return True


def _check(entry: Entry, recipe: Recipe, hidden: int) -> None:
    if recipe.weights not in TABLE_WEIGHTS:
        raise InputError(
            f"a rule asks for {recipe.weights} embeddings; a table is stored in {', '.join(TABLE_WEIGHTS)} or as published."
        )
    if recipe.asymmetric:
        raise InputError(
            "asymmetric codes were asked for, and the embedding table has no zero points. Say asymmetric = false in the rule "
            f"for {EMBEDDING.removesuffix('.weight')}."
        )
    if hidden % recipe.group_size:
        raise InputError(f"group size {recipe.group_size} does not divide the {hidden} numbers of an embedding.")
    if entry.published and not recipe.requantize:
        raise InputError(
            f"the checkpoint stores its embeddings quantized already ({entry.published}). Leave the rule for "
            f"{EMBEDDING.removesuffix('.weight')} out, or say --requantize to add a second error to the first."
        )
