"""Recipes: TOML to dataclass and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from corral.spec.errors import InputError
from corral.spec.quant_scheme import GROUP_SIZES, SCHEMES
from corral.spec.recipe import Recipe, read_recipe
from corral.spec.rule import Rule
from corral.spec.target import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_toml_round_trip(target: str, group_size: int, tmp_path: Path) -> None:
    for kernels, schemes in TARGETS[target].kernels.items():
        for weights in schemes:
            recipe = Recipe(
                target=target, weights=weights, group_size=group_size, requantize=group_size == 64, kernels=kernels
            )
            (tmp_path / "recipe.toml").write_text(recipe.to_toml())
            assert read_recipe(tmp_path / "recipe.toml") == recipe
            assert Recipe.from_json(recipe.to_json()) == recipe


RULES = (
    Rule(matrices="layers.*.self_attn.*", weights="int8", method="rtn"),
    Rule(matrices="layers.2.self_attn.[qkv]_proj", group_size=32),
    Rule(matrices="lm_head", weights="fp32"),
)


def test_rules_in_toml_and_json(tmp_path: Path) -> None:
    recipe = Recipe(method="gptq", rules=RULES)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    assert Recipe.from_json(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    assert '  { matrices = "lm_head", weights = "fp32" },' in recipe.to_toml().splitlines()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("layers.2.self_attn.k_proj.weight", ("int8", 32, "rtn")),  # of both rules
        ("layers.2.self_attn.o_proj.weight", ("int8", 64, "rtn")),
        ("layers.2.feed_forward.experts.down_proj", ("int4", 64, "gptq")),
        ("lm_head.weight", ("fp32", 64, "rtn")),  # nothing is rounded
    ],
)
def test_later_rules_beat_earlier_ones_key_by_key(weight: str, expected: tuple[str, int, str]) -> None:
    found = Recipe(method="gptq", group_size=64, rules=RULES).of(weight)
    assert (found.weights, found.group_size, found.method, found.rules) == (*expected, ())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("layers.0.feed_forward.experts.down_proj", ("int4", True)),
        ("layers.0.self_attn.k_proj.weight", ("int4", False)),
        ("layers.0.self_attn.q_proj.weight", ("int8", False)),  # without a word: they have no zero points
        ("lm_head.weight", ("fp32", False)),
    ],
)
def test_codes_are_asymmetric_where_they_can_be_and_no_rule_says_otherwise(
    weight: str, expected: tuple[str, bool]
) -> None:
    rules = (
        Rule(matrices="layers.*.self_attn.k_proj", asymmetric=False),
        Rule(matrices="layers.*.self_attn.q_proj", weights="int8"),
        Rule(matrices="lm_head", weights="fp32"),
    )
    found = Recipe(asymmetric=True, rules=rules).of(weight)
    assert (found.weights, found.asymmetric) == expected


def test_options_win_over_the_file_unless_they_are_not_given(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('weights = "int8"\ngroup_size = 32\n')
    assert read_recipe(tmp_path / "recipe.toml", group_size=64, weights=None) == Recipe(weights="int8", group_size=64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"target": "toaster"}, r'target "toaster" is not known; expected one of portable, cpu'),
        ({"weights": "int5"}, r'weights "int5" are not known; expected one of fp32'),
        ({"method": "magic"}, r'method "magic" is not known; expected one of rtn'),
        ({"group_size": 48}, "group_size is 48, expected one of 32, 64, 128"),
        ({"group_size": "32"}, "group_size is '32', expected a int"),
        ({"group_size": True}, "group_size is True, expected a int"),
        ({"requantize": 1}, "requantize is 1, expected a bool"),
        ({"weights": 4}, "weights is 4, expected a str"),
        ({"kv": "int2"}, r'kv "int2" is not known; expected one of float, int8, int4'),
        (
            {"kv": "int8"},
            r"int8 is read by corral's CPU kernels only; target cpu with stock kernels stores it in float32",
        ),
        (
            {"kv": "int4", "target": "cuda"},
            r"target cuda with stock kernels stores it in float16. Use .* or --kv float",
        ),
        ({"kernels": "magic"}, r'kernels "magic" are not known for target cpu; expected one of stock, corral'),
        ({"kernels": "corral", "target": "portable"}, r'kernels "corral" are not known for target portable'),
        (
            {"kernels": "corral", "weights": "fp32"},
            r'kernels "corral" compute int8, int4, int3, int2 weights, not fp32. Use --kernels stock',
        ),
        ({"weights": "int3"}, r'"stock" compute fp32, int8, int4 weights, not int3. Use --kernels corral'),
        ({"rules": {"matrices": "lm_head"}}, "rules is {'matrices': 'lm_head'}, expected a list"),
        ({"rules": [{"weights": "int8"}]}, r"rule 1 is {'weights': 'int8'}; expected a table with `matrices`"),
        ({"rules": [{"matrices": "*", "bits": 8}]}, r'rule 1: key "bits" is not known; expected matrices'),
        ({"rules": [{"matrices": "*", "group_size": "32"}]}, "rule 1: group_size is '32', expected a int"),
        ({"rules": [{"matrices": "*", "weights": "int5"}]}, r'rule for "\*": weights "int5" are not known'),
        ({"rules": [{"matrices": "*", "method": "awq"}]}, "method awq scales inputs that matrices share"),
        ({"method": "awq", "rules": [{"matrices": "*", "weights": "fp32"}]}, "method awq scales inputs"),
        (
            {"target": "tensorrt", "rules": [{"matrices": "*", "weights": "int8"}]},
            r'rule for "\*": target tensorrt does not take int8 weights',
        ),
        (
            {"target": "tensorrt", "method": "awq", "rules": [{"matrices": "lm_head", "weights": "fp8"}]},
            r'rule for "lm_head": method awq scales inputs that matrices share',
        ),
        ({"asymmetric": 1}, "asymmetric is 1, expected a bool"),
        (
            {"asymmetric": True, "weights": "int8"},
            "asymmetric codes have up to 4 bits, and int8 weights were asked for",
        ),
        (
            {"asymmetric": True, "weights": "fp32"},
            "up to 4 bits, and fp32 weights were asked for. Leave asymmetric out",
        ),
        ({"asymmetric": True, "target": "cuda"}, "target cuda take no zero points. .* use target portable, cpu"),
        ({"asymmetric": True, "target": "tensorrt"}, "target tensorrt take no zero points"),
        (
            {"rules": [{"matrices": "*", "weights": "int8", "asymmetric": True}]},
            r'rule for "\*": asymmetric codes have up to 4 bits',
        ),
        ({"groupsize": 32}, 'key "groupsize" is not known; expected target'),
    ],
    ids=str,
)
def test_refusals(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe.from_json(data)


def test_a_target_refuses_weights_it_cannot_run() -> None:
    unsupported = [(t, w) for t, target in TARGETS.items() for w in SCHEMES if w not in target.all_weights]
    assert unsupported, "every target takes everything: this test sees nothing"
    for target, weights in unsupported:
        with pytest.raises(InputError, match=rf"target {target} does not take {weights} weights; it takes"):
            Recipe(target=target, weights=weights)


@pytest.mark.parametrize("text", [None, b"weights = ", b"\xff\xfe"], ids=["missing", "cut", "not text"])
def test_unreadable_files(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / "recipe.toml").write_bytes(text)
    with pytest.raises(InputError, match=r"recipe .*recipe\.toml is not readable TOML"):
        read_recipe(tmp_path / "recipe.toml")


def test_bits_per_weight() -> None:
    assert SCHEMES["int4"].bits_per_weight(32) == 5
    assert SCHEMES["int4"].bits_per_weight(128) == 4.25
    assert SCHEMES["fp16"].bits_per_weight(128) == 16
    assert [s.name for s in SCHEMES.values() if s.is_quantized] == ["fp8", "int8", "int4", "int3", "int2"]
