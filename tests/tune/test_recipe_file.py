from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.spec.model_config import parse_config
from corral.spec.recipe import Recipe
from corral.tune.choice import Choice
from corral.tune.parts import Part, parts_of
from corral.tune.recipe_file import as_recipe, recipe_text

CHOICES = (
    Choice(weights="int4", group_size=32, method="gptq"),
    Choice(weights="int4", group_size=128, method="rtn-mse"),
    Choice(weights="int8", group_size=128, method="rtn"),
    Choice(weights="fp32", group_size=128, method="rtn"),
)


def parts(config: dict[str, Any]) -> tuple[Part, ...]:
    """With the names that a checkpoint of such a config has."""
    model = parse_config(config)
    names = []
    for i, layer in enumerate(model.layers):
        names += [f"layers.{i}.self_attn.{part}_proj.weight" for part in "qkvo"]
        dense = f"layers.{i}.feed_forward" + (".shared_expert" if layer.moe else "")
        names += [f"{dense}.{part}_proj.weight" for part in ("gate", "up", "down")]
        names += [f"layers.{i}.feed_forward.experts.{part}_proj" for part in ("gate_up", "down")] * layer.moe
        names += [f"layers.{i}.feed_forward.router.weight"] * layer.moe
    found = parts_of(model, names)
    assert sorted(name for part in found for name in part.parameters) == sorted(
        [EMBEDDING, HEAD, *(name for name in names if "router" not in name)]
    )
    return found


@pytest.mark.parametrize("form", ["scout", "maverick", "guard"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_the_recipe_says_of_each_matrix_what_was_chosen(
    tiny_config: Callable[[str], dict[str, Any]], form: str, data: st.DataObject
) -> None:
    # Few choices, so that kinds of parts often have a usual one.
    some = data.draw(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=3))
    chosen = {part: data.draw(st.sampled_from(some)) for part in parts(tiny_config(form))}
    recipe = as_recipe(Recipe(), chosen)
    for part, choice in chosen.items():
        if part.is_table and choice.weights == "fp32":  # as published
            assert not any(rule.matches(EMBEDDING) for rule in recipe.rules)
            continue
        for name in part.parameters:
            found = recipe.of(name)
            assert (found.weights, found.method) == (choice.weights, choice.method)
            assert choice.weights == "fp32" or found.group_size == choice.group_size
    assert all({rule.method, rule.group_size} == {None} for rule in recipe.rules if rule.weights == "fp32")
    text = recipe_text(recipe, head=["Made by a test."], rest="Else.", remarks=["so"] * len(recipe.rules))
    assert Recipe.from_json(tomllib.loads(text)) == recipe
    table = next(part for part in chosen if part.is_table)
    assert chosen[table].weights == "fp32" or recipe.rules[-1].matches(EMBEDDING)


def test_with_kernels_of_corral_the_recipe_itself_is_quantized(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    """Even where most parts are not: those have no kernels of corral's, and a recipe that is all theirs is refused."""
    chosen = {part: CHOICES[0 if part.is_experts else 3] for part in parts(tiny_config("scout"))}
    recipe = as_recipe(Recipe(kernels="corral"), chosen)
    assert (recipe.kernels, recipe.weights) == ("corral", "int4")
    for part, choice in chosen.items():
        assert part.is_table or {recipe.of(name).weights for name in part.parameters} == {choice.weights}


def test_what_most_layers_have_is_one_line(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    found = parts(tiny_config("scout"))
    chosen = dict.fromkeys(found, CHOICES[0]) | {found[0]: CHOICES[3]}  # the embedding as published
    for part in found:
        if part.kind == "layers.*.self_attn.o_proj":
            chosen[part] = CHOICES[1 if part.layer == 3 else 2]
    recipe = as_recipe(Recipe(), chosen)
    assert [rule.matrices for rule in recipe.rules] == ["layers.*.self_attn.o_proj", "layers.3.self_attn.o_proj"]
    assert recipe_text(recipe, head=[], rest="", remarks=["usual", "one"]).splitlines()[-3:] == [
        '  { matrices = "layers.*.self_attn.o_proj", weights = "int8", group_size = 128, method = "rtn" },      # usual',
        '  { matrices = "layers.3.self_attn.o_proj", weights = "int4", group_size = 128, method = "rtn-mse" },  # one',
        "]",
    ]


def test_what_one_layer_has_is_said_of_that_layer(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    found = parts(tiny_config("two_layers"))
    chosen = dict.fromkeys(found, CHOICES[0])
    outs = [part for part in found if part.kind == "layers.*.self_attn.o_proj"]
    chosen |= {outs[0]: CHOICES[1], outs[1]: CHOICES[2]}
    recipe = as_recipe(Recipe(), chosen)
    assert [rule.matrices for rule in recipe.rules[:2]] == ["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"]
