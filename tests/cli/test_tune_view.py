"""What `corral tune` says of a choice: nothing is left out, counted twice or blamed on the wrong matrices."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from corral.cli.tune_view import show_tuned, tuned_table, written
from corral.spec.recipe import Recipe
from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.tune.recipe_file import as_recipe
from corral.tune.tuned import Budget, Tried, Tuned
from corral.validate.statistics import spread

INT4, INT8, FP32 = (
    Choice(weights=weights, group_size=128, method=method)
    for weights, method in (("int4", "gptq"), ("int8", "gptq"), ("fp32", "rtn"))
)
OUT = "self_attn.o_proj"
PATTERNS = (
    "embed_tokens",
    f"layers.0.{OUT}",
    f"layers.1.{OUT}",
    f"layers.2.{OUT}",
    "layers.2.feed_forward.experts.*",
    "lm_head",
)
PARTS = [Part(pattern=name, layer=i - 1, parameters=(f"{name}.weight",)) for i, name in enumerate(PATTERNS)]
# Each part's divergence is a digit of its own, so that a sum tells which parts are in it.
CHOSEN = [
    Tried(part=part, choice=choice, kl=kl, bytes=size)
    for part, choice, kl, size in zip(
        PARTS,
        (FP32, INT8, INT8, INT4, INT4, INT4),
        (0.0, 0.1, 0.01, 0.001, 0.0001, 0.0002),
        (10, 200, 30, 4, 50_000, 6_000),
        strict=True,
    )
]
SMALLER = dataclasses.replace(CHOSEN[1], choice=INT4, kl=0.7, bytes=100)
TUNED = Tuned(
    budget=Budget(what="size", limit=10_965_056),
    recipe=as_recipe(Recipe(), {one.part: one.choice for one in CHOSEN}),
    chosen=tuple(CHOSEN),
    tried=(*CHOSEN, SMALLER, dataclasses.replace(SMALLER, kl=0.3), dataclasses.replace(SMALLER, bytes=50, kl=0.9)),
    kl=0.1234,
    bytes=10_900_000,
    tokens_per_second=None,
    tokens=4096,
    text="some.txt",
)


def test_the_file_says_what_each_line_costs() -> None:
    text = written(TUNED)
    assert Recipe.from_json(tomllib.loads(text)) == TUNED.recipe
    head = text.split("\n\n")[0].splitlines()
    assert head[0] == "# Chosen by corral tune for at most 10,965,056 bytes."
    assert head[1].startswith("# KL of the weights together: 0.12 nats a token, on 4,096 tokens of some.txt")
    assert head[2] == "# (the parts one by one add up to 0.11). The bundle: 10,900,000 bytes."
    assert re.findall(r'matrices = "(.*?)".*  # (.*)', text) == [
        ("layers.*.self_attn.o_proj", "KL 1.1e-01, 230 B in 2 layers"),
        ("layers.2.self_attn.o_proj", "KL 1.0e-03, 4 B"),
    ]
    assert "# So is stored what no rule names: KL 3.0e-04, 56.0 kB in 2 parts; the embedding is as published." in text


def test_the_screen_says_what_a_step_less_would_cost_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[0]: row[1:] for row in tuned_table(TUNED).rows}
    assert rows["embed_tokens"] == ("as published", "0", "10 B", "\N{EN DASH}")
    assert rows["layers.0.self_attn.o_proj"] == ("int8 g128 gptq", "1.0e-01", "200 B", "3.0e-01")
    show_tuned(TUNED, Path("a checkpoint?layers=0-2"), Path("tuned.toml"))
    shown = capsys.readouterr().out
    assert "The bundle: 10,900,000 bytes" in shown
    assert "next: corral compile 'a checkpoint?layers=0-2' -o OUT --recipe tuned.toml" in shown


@pytest.mark.parametrize(("limit", "missed"), [(2000, False), (2100, True)])
def test_a_speed_is_told_with_its_spread_and_a_miss_too(limit: float, missed: bool) -> None:
    budget = Budget(what="tokens-per-second", limit=limit)
    text = written(dataclasses.replace(TUNED, budget=budget, tokens_per_second=spread([1500, 2000, 2500])))
    assert f"for at least {limit:,} tokens a second" in text
    assert "decodes 2,000 tokens a second (1,500 to 2,500 in 3 runs) on this machine" in text
    assert ("misses the budget" in text) == missed
    assert Recipe.from_json(tomllib.loads(text)) == TUNED.recipe
