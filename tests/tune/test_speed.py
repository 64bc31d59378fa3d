"""A budget of speed, with a source of speeds that is known: a token takes as long as a law says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from corral.model.checkpoint import Checkpoint, open_checkpoint
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.tune import timer as timer_module
from corral.tune import tune as tune_module
from corral.tune.choice import Choice
from corral.tune.limits import limit_of
from corral.tune.parts import Part, parts_of
from corral.tune.select import select
from corral.tune.sizes import Sizes
from corral.tune.speed import Speeds
from corral.tune.timer import BuildTimer, Chosen
from corral.tune.tune import tune
from corral.tune.tuned import Budget, Tried
from corral.validate.build import Build
from corral.validate.latency import Latency
from corral.validate.statistics import Spread, quantiles, spread

TinyCheckpoint = Callable[[str], Path]
FEW = Recipe(calibration_tokens=1024)
CORRAL = dataclasses.replace(FEW, kernels="corral")
SECONDS = {"fp32": 8.0, "int8": 4.0, "int4": 2.0, "int3": 3.0, "int2": 2.5}  # of a model all in such weights
FP32, INT8, INT4 = (Choice(weights=weights, group_size=32, method="rtn") for weights in ("fp32", "int8", "int4"))


@dataclass
class Law:
    """A `Timer`: each part takes its share of `SECONDS`, whatever its groups; `mixed` times as long if parts differ.

    The law of the n-th timing is `drift` ** n times slower.
    """

    sizes: Sizes
    mixed: float = 1.0
    drift: float = 1.0
    timed: list[Chosen] = field(default_factory=list)

    def seconds(self, chosen: Chosen) -> float:
        visited = {part: self.sizes.visited(part) for part in chosen}
        whole = sum(count * SECONDS[chosen[part].weights] for part, count in visited.items()) / sum(visited.values())
        alike = len({choice.weights for part, choice in chosen.items() if visited[part]}) == 1
        return whole * (1 if alike else self.mixed)

    def __call__(self, choices: Sequence[Chosen]) -> list[Spread]:
        slower = self.drift ** len(self.timed)
        self.timed += choices
        return [spread([factor / self.seconds(one) / slower for factor in (0.9, 1.0, 1.2)]) for one in choices]


@pytest.fixture
def scout(tiny_checkpoint: TinyCheckpoint) -> tuple[Checkpoint, tuple[Part, ...]]:
    checkpoint = open_checkpoint(tiny_checkpoint("topk2"))
    return checkpoint, parts_of(checkpoint.config, checkpoint.names)


def test_what_a_token_is_multiplied_with(scout: tuple[Checkpoint, tuple[Part, ...]]) -> None:
    checkpoint, parts = scout
    sizes = Sizes(checkpoint, FEW)
    table, qkv, out, shared, experts, *_ = map(sizes.visited, parts)
    assert (table, qkv, out) == (0, 64 * 64 * 2, 64 * 64)  # two heads of keys and values for four of queries
    assert shared == 3 * 64 * 64
    assert experts == 2 * shared, "two of eight"
    assert sizes.visited(parts[-1]) == 320 * 64


@pytest.mark.parametrize("recipe", [FEW, CORRAL], ids=["stock", "corral"])
def test_speed_is_foretold_from_builds_that_store_all_alike(
    scout: tuple[Checkpoint, tuple[Part, ...]], recipe: Recipe
) -> None:
    """Exactly, where the law is the one that is assumed: also of fp32, which experts cannot have in corral's kernels."""
    checkpoint, parts = scout
    sizes = Sizes(checkpoint, recipe)
    law = Law(sizes)
    speeds = Speeds(sizes, parts, law)
    kinds = ["int4", "fp32", "int8"] + ["int3", "int2"] * (recipe is CORRAL)
    assert len(law.timed) == len(kinds)
    for i, part in enumerate(parts[1:]):
        for weights in (kinds[i % len(kinds)], "int8"):
            if not (part.is_experts and weights == "fp32" and recipe is CORRAL):
                group = 128 if weights == "fp32" else 64
                share = sizes.visited(part) / sum(map(sizes.visited, parts))
                assert speeds.foretold(part, (weights, group)) == pytest.approx(share * SECONDS[weights])
    assert speeds.foretold(parts[0], ("int8", 32)) == 0
    assert len(law.timed) == len(kinds), "foretelling times nothing"
    # Smaller groups have more bytes: 4 bits and a scale for each 32 instead of 64.
    scale = 16 if recipe is CORRAL else 32
    more = speeds.foretold(parts[1], ("int4", 32)) / speeds.foretold(parts[1], ("int4", 64))
    assert more == pytest.approx((4 + scale / 32) / (4 + scale / 64))


def ways(sizes: Sizes, parts: Sequence[Part]) -> list[Tried]:
    """Less divergence for more bits, and other parts more sensitive than others."""
    lost = {"fp32": 0.0, "int8": 0.01, "int4": 1.0}
    return [
        Tried(part=part, choice=choice, kl=(1 + i % 3) * lost[choice.weights], bytes=sizes.stored(part, choice.storage))
        for i, part in enumerate(parts)
        for choice in (FP32, INT8, INT4)
    ]


@pytest.mark.parametrize("mixed", [1.0, 1.3], ids=["as foretold", "slower than foretold"])
@pytest.mark.parametrize("limit", [2.2, 3.0, 7.0])
def test_the_best_that_is_as_fast_when_timed(
    scout: tuple[Checkpoint, tuple[Part, ...]], limit: float, mixed: float
) -> None:
    checkpoint, parts = scout
    sizes = Sizes(checkpoint, FEW)
    law = Law(sizes, mixed=mixed)
    speeds = Speeds(sizes, parts, law)
    within = limit_of(Budget(what="tokens-per-second", limit=1 / limit), parts, None, sizes, speeds)  # type: ignore[arg-type]
    chosen = select(ways(sizes, parts), within)
    assert chosen is not None
    seconds = law.seconds({one.part: one.choice for one in chosen})
    assert seconds <= limit
    if mixed == 1:
        assert seconds > 0.85 * limit, "room is left"
    all_alike = min(
        sum(one.kl for one in ways(sizes, parts) if one.choice == c)
        for c in (INT8, INT4)
        if SECONDS[c.weights] <= limit
    )
    assert sum(one.kl for one in chosen) <= all_alike
    assert chosen[0].choice == FP32, "nothing is multiplied with the embedding"


def test_a_rate_that_nothing_reaches_is_refused_before_anything_is_measured(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tune_module, "gather")
    checkpoint = tiny_checkpoint("two_layers")
    budget = Budget(what="tokens-per-second", limit=0.6)
    said = (
        r"nothing was found that decodes at least 0\.6 tokens a second on this machine\. "
        r"The fastest, .* in int4, decodes 0\.5 tokens a second \(0\.45 to 0\.6 in 3 runs\)\. Ask for less"
    )
    with pytest.raises(InputError, match=said):
        tune(checkpoint, budget, FEW, tokens=512, timer=Law(Sizes(open_checkpoint(checkpoint), FEW)))


def test_the_speed_that_is_told_was_not_chosen_by(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = tiny_checkpoint("two_layers")
    law = Law(Sizes(open_checkpoint(checkpoint), FEW), drift=1.1)
    tuned = tune(checkpoint, Budget(what="tokens-per-second", limit=1 / 5), FEW, tokens=512, timer=law)
    last, choices = law.timed[-1], {one.part: one.choice for one in tuned.chosen}
    assert last == choices
    before = len(law.timed) - 1
    expected = 1 / law.seconds(choices) / 1.1**before
    assert tuned.tokens_per_second is not None and tuned.tokens_per_second.median == pytest.approx(expected)
    assert tuned.to_json()["tokens_per_second"]["n"] == 3


def test_builds_are_compiled_and_timed_as_they_were_chosen(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was chosen is what is timed, by turns, on the prompt that was given; only methods are left out."""
    checkpoint = open_checkpoint(tiny_checkpoint("two_layers"))
    parts = parts_of(checkpoint.config, checkpoint.names)
    first = dict.fromkeys(parts, INT4) | {parts[0]: FP32}
    second = first | {parts[-1]: dataclasses.replace(INT8, method="gptq")}
    seen: list[Bundle] = []

    def measure(builds: Sequence[Build], prompt: Sequence[int], **how: object) -> list[Latency | None]:
        runs = [build.time_decode(prompt, 4) for build in builds]
        assert all(run and run.tokens_per_second > 0 for run in runs)
        seen.extend(build._llm.bundle for build in builds)  # type: ignore[attr-defined]
        one, few = spread([7.0]), quantiles([1.0])
        known = Latency(tokens_per_second=one, time_to_first_token=one, first_tokens=few, between_tokens=few)
        return [known, dataclasses.replace(known, tokens_per_second=spread([9.0]))]

    monkeypatch.setattr(timer_module, "measure_latency", measure)
    found = BuildTimer(checkpoint=checkpoint.directory, recipe=FEW, prompt=[5, 6, 7])([first, second])
    assert [one.median for one in found] == [7.0, 9.0]
    recipes = [bundle.manifest.recipe for bundle in seen]
    assert [recipe.of("lm_head.weight").weights for recipe in recipes] == ["int4", "int8"]
    assert {recipe.of("layers.0.self_attn.q_proj.weight").group_size for recipe in recipes} == {32}
    assert {recipe.methods for recipe in recipes} == {frozenset({"rtn"})}
    assert not any(bundle.directory.exists() for bundle in seen)
