"""Recipes with rules: each matrix is stored as the rules for it say, and a bundle of mixed storage runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corral.graphs import compile
from corral.graphs.compiler import lower
from corral.graphs.coverage import stored_as
from corral.model.checkpoint import open_checkpoint
from corral.runtime import LLM
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule

TinyCheckpoint = Callable[[str], Path]
MIXED = Recipe(
    group_size=32,
    rules=(
        Rule(matrices="layers.*.self_attn.*", weights="int8", group_size=64),
        Rule(matrices="layers.1.self_attn.k_proj", weights="int4", method="hqq"),
        Rule(matrices="layers.2.feed_forward.*", weights="fp32"),
        Rule(matrices="layers.1.feed_forward.*", method="rtn-mse", asymmetric=True),
        Rule(matrices="layers.3.feed_forward.experts.*", group_size=64, method="gptq"),
        Rule(matrices="lm_head", weights="int8"),
    ),
    calibration_tokens=4096,
)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_each_matrix_is_stored_as_its_rules_say(tiny_checkpoint: TinyCheckpoint, target: str) -> None:
    plan = lower(open_checkpoint(tiny_checkpoint("scout")), dataclasses.replace(MIXED, target=target)).plan
    stored = {part: stored_as(entry) for entry in plan for part in entry.weight.split("+")}
    assert {
        name: stored[name]
        for name in (
            "layers.0.self_attn.q_proj.weight",
            "layers.1.self_attn.k_proj.weight",
            "layers.1.self_attn.v_proj.weight",
            "layers.0.feed_forward.experts.down_proj",
            "layers.1.feed_forward.experts.down_proj",
            "layers.2.feed_forward.experts.down_proj",
            "layers.2.feed_forward.router.weight",
            "layers.2.feed_forward.shared_expert.up_proj.weight",
            "layers.3.feed_forward.experts.gate_up_proj",
            "lm_head.weight",
        )
    } == {
        "layers.0.self_attn.q_proj.weight": "int8 g64",
        "layers.1.self_attn.k_proj.weight": "int4 g64 hqq",
        "layers.1.self_attn.v_proj.weight": "int8 g64",
        "layers.0.feed_forward.experts.down_proj": "int4 g32",
        "layers.1.feed_forward.experts.down_proj": "int4 g32 asymmetric rtn-mse",
        "layers.2.feed_forward.experts.down_proj": "float32",
        "layers.2.feed_forward.router.weight": "float32",
        "layers.2.feed_forward.shared_expert.up_proj.weight": "float32",
        "layers.3.feed_forward.experts.gate_up_proj": "int4 g64 gptq",
        "lm_head.weight": "int8 g32",
    }


def test_both_targets_compute_what_is_stored(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    logits = {}
    for target in ("cpu", "portable"):
        bundle = compile(tiny_checkpoint("scout"), tmp_path / target, dataclasses.replace(MIXED, target=target), jobs=1)
        assert bundle.manifest.recipe.rules == MIXED.rules
        assert bundle.manifest.calibration is not None
        logits[target] = np.concatenate(list(LLM(tmp_path / target).score_pieces(ids)))
    difference = np.abs(logits["cpu"] - logits["portable"])
    assert difference.mean() < 0.05 * np.abs(logits["portable"]).max()  # activations of int8, as everywhere on cpu


def test_calibrated_rules_need_statistics_and_others_do_not(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("scout"))
    assert lower(checkpoint, MIXED).statistics
    assert not lower(checkpoint, dataclasses.replace(MIXED, rules=MIXED.rules[:3])).statistics


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule(matrices="layers.9.*", weights="int8"), r'rule for "layers\.9\.\*" matches no matrix'),
        (Rule(matrices="*.router", weights="int8"), r'rule for "\*\.router" matches no matrix that is quantized'),
        (
            Rule(matrices="*.experts.down_proj", weights="int8"),
            "of the same experts, are stored with different weights",
        ),
        (
            Rule(matrices="*.experts.down_proj", weights="fp32"),
            "of the same experts, are stored with different weights",
        ),
        (
            Rule(matrices="*.experts.down_proj", asymmetric=True),
            "of the same experts, are stored with different weights, group sizes or zero points",
        ),
        (
            Rule(matrices="embed_tokens", weights="int4", asymmetric=True),
            "the embedding table has no zero points. Say asymmetric = false in the rule for embed_tokens",
        ),
        (Rule(matrices="lm_head", group_size=128), "group size 128 does not divide the 64 inputs of lm_head"),
    ],
)
def test_rules_that_cannot_be_followed(tiny_checkpoint: TinyCheckpoint, rule: Rule, says: str) -> None:
    with pytest.raises(InputError, match=says):
        lower(open_checkpoint(tiny_checkpoint("scout")), Recipe(group_size=32, rules=(rule,)))


def test_awq_scales_for_the_scheme_of_each_matrix(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Both schemes fold their scales into the same norms; the bundle stays near the model in float."""
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    rules = (Rule(matrices="layers.*.self_attn.[qk]_proj", weights="int8"),)
    awq = Recipe(target="portable", method="awq", group_size=32, calibration_tokens=4096, rules=rules)
    logits = []
    for recipe in (awq, Recipe(target="portable", weights="fp32")):
        compile(tiny_checkpoint("scout"), tmp_path / recipe.method, recipe, jobs=1)
        logits.append(np.concatenate(list(LLM(tmp_path / recipe.method).score_pieces(ids))))
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.95
