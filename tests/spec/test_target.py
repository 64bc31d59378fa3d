"""Which engines exist for which GPU: every refusal names what was asked, what there is, and another way."""

from __future__ import annotations

import pytest

from corral.spec.errors import InputError
from corral.spec.gpus import GPUS, capability_of
from corral.spec.recipe import Recipe
from corral.spec.target import TARGETS


def test_gpus_are_chosen_by_name_or_number_each_once_lowest_first() -> None:
    recipe = Recipe(target="tensorrt-rtx", weights="int4", gpu="rtx5090, RTX4090,8.9,a100")
    assert recipe.capabilities == ("8.0", "8.9", "12.0")
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe(target="tensorrt-rtx").capabilities == ()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"gpu": "h100"}, r"capability 9\.0; it builds for 8\.0.*Use --target tensorrt or cuda \(without --gpu"),
        ({"gpu": "7.5", "weights": "int4"}, r"for compute capability 7\.5; .*Use --target cuda \(without --gpu"),
        ({"gpu": "6.1"}, r"compute capability 6\.1.*No target of this version does"),
        (
            {"gpu": "a100", "weights": "fp8"},
            r"8\.0 has no fp8 weights.*takes fp16, int4, and fp8 needs one of 8\.9, 12\.0",
        ),
        ({"gpu": "8.9,rtx3090", "weights": "fp8"}, r"8\.6 has no fp8 weights"),
        ({"gpu": "rtx3090", "rules": [{"matrices": "lm_head", "weights": "fp8"}]}, r"lm_head.*8\.6 has no fp8 weights"),
        (
            {"weights": "fp8", "method": "gptq"},
            "method gptq does not make fp8 weights; expected rtn",
        ),
        ({"gpu": "rtx9999"}, r'gpu "rtx9999" is not known; expected a compute capability such as 8\.9, or one of'),
        ({"gpu": "8.9", "target": "cpu"}, r"takes no --gpu \(8\.9\).*tensorrt-rtx, tensorrt"),
        ({"weights": "int8"}, "target tensorrt-rtx does not take int8 weights; it takes fp16, int4, fp8"),
        ({"max_context": 0}, "max_context is 0"),
        ({"max_batch": -1}, "max_batch is -1"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_remedy(recipe: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe.from_json({"target": "tensorrt-rtx", **recipe})


def test_tables_agree() -> None:
    for target in TARGETS.values():
        for capability, schemes in target.capabilities.items():
            assert capability_of(capability) == capability
            assert set(schemes) <= set(target.weights)
        assert bool(target.engine) == bool(target.capabilities)
    assert {capability_of(name) for name in GPUS} >= {"8.0", "8.6", "8.9", "9.0", "12.0"}
