from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from corral.exporter.export import Exported, export
from corral.graphs import compile
from corral.graphs.bundle_size import bundle_bytes
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.statistics import statistics_of
from corral.graphs.compiler import lower
from corral.model.checkpoint import Checkpoint, open_checkpoint
from corral.spec.bundle import open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule
from corral.tune import sizes as sizes_module
from corral.tune.choice import Choice
from corral.tune.parts import Part, parts_of
from corral.tune.recipe_file import as_recipe
from corral.tune.select import Limit, select
from corral.tune.sensitivity import Meter
from corral.tune.sizes import Sizes
from corral.tune.tune import tune
from corral.tune.tuned import Budget, Tried, Tuned
from corral.validate import compare

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]
FEW = Recipe(calibration_tokens=2048)
INT4 = Choice(weights="int4", group_size=32, method="rtn")
WINDOW = 64


@pytest.mark.parametrize("form", ["two_layers", "tied"])
def test_divergence_is_what_a_bundle_of_that_rule_shows(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, form: str
) -> None:
    """Of the embedding, a part in the middle, and the head: against a bundle that computes in float32."""
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    ids = np.random.default_rng(1).integers(0, 256, (3, WINDOW))
    meter = Meter(checkpoint, statistics_of(checkpoint, tmp_path, "none"), ids)
    parts = parts_of(checkpoint.config, checkpoint.names)
    chosen = dict.fromkeys([parts[0], parts[-1], *(part for part in parts if part.layer == 1)], INT4)
    rules = tuple(Rule(matrices=part.pattern, weights="int4", group_size=32, method="rtn") for part in chosen)
    compile(checkpoint.directory, tmp_path / "bundle", Recipe(target="portable", weights="fp32", rules=rules), jobs=1)
    how = {"window": WINDOW, "repeats": 1, "prompt_tokens": 4, "decode_tokens": 2}
    report = compare(checkpoint.directory, [tmp_path / "bundle"], token_ids=ids.ravel().tolist(), **how)  # type: ignore[arg-type]
    # All predictions but each window's last one, of which no token tells.
    expected = report.candidates[0].accuracy.kl.mean
    assert expected > 1e-4
    assert meter.divergence(chosen) == pytest.approx(expected, rel=0.1)
    assert meter.divergence(chosen) == meter.divergence(chosen), "what was replaced is not as it was"
    assert meter.divergence(dict.fromkeys(parts, Choice(weights="fp32", group_size=32, method="rtn"))) == 0


def test_parts_in_any_order_give_the_same(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("scout"))
    ids = np.random.default_rng(2).integers(0, 256, (2, 32))
    parts = parts_of(checkpoint.config, checkpoint.names)[::5]
    found = []
    for order in (parts, parts[::-1]):
        meter = Meter(checkpoint, statistics_of(checkpoint, tmp_path, "none"), ids)
        found.append({part.pattern: meter.divergence({part: INT4}) for part in order})
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("kernels", ["stock", "corral"])
def test_sizes_are_known_to_the_byte(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kernels: str) -> None:
    recipe = Recipe(group_size=32, kernels=kernels, rules=(Rule(matrices="lm_head", group_size=64),))
    bundle = compile(tiny_checkpoint("two_layers"), tmp_path / "bundle", recipe, jobs=1)
    checkpoint = open_checkpoint(tiny_checkpoint("two_layers"))
    assert bundle_bytes(lower(checkpoint, recipe), checkpoint) == bundle.manifest.bytes


def test_choices_share_one_captured_graph(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """One choice after another is lowered from the same graph, and none finds what another left there."""
    checkpoint = open_checkpoint(tiny_checkpoint("two_layers"))
    parts = parts_of(checkpoint.config, checkpoint.names)
    int4, int8 = (dict.fromkeys(parts, dataclasses.replace(INT4, weights=weights)) for weights in ("int4", "int8"))
    captures = []

    def count(one: Checkpoint) -> Exported:
        captures.append(one)
        return export(one)

    monkeypatch.setattr(sizes_module, "export", count)
    sizes = Sizes(checkpoint, FEW)
    small, large, again = (sizes.bundle(chosen) for chosen in (int4, int8, int4))
    assert len(captures) == 1
    assert small == again < large == bundle_bytes(lower(checkpoint, as_recipe(FEW, int8)), checkpoint)


@pytest.fixture(scope="module")
def generous(tiny_checkpoint: TinyCheckpoint) -> Tuned:
    return tune(tiny_checkpoint("two_layers"), Budget(what="size", limit=1e9), FEW, tokens=512)


def test_with_room_for_all_nothing_is_lost(generous: Tuned) -> None:
    assert generous.kl == generous.sum_of_parts == 0
    assert generous.recipe.weights == "fp32" and not generous.recipe.rules
    assert {one.choice.weights for one in generous.tried} == {"int4", "int8", "fp32"}
    int4, int8 = (
        sum(one.kl for one in generous.tried if one.choice.weights == weights) for weights in ("int4", "int8")
    )
    assert int4 > 20 * int8 > 0
    assert min(one.kl for one in generous.tried if one.choice.weights == "int4") > 0, "a part is not replaced"


def test_a_size_is_kept_and_used(
    tiny_checkpoint: TinyCheckpoint,
    tiny_bundle: TinyBundle,
    generous: Tuned,
    tmp_path: Path,
) -> None:
    """Of the size of an int4 bundle: what a smaller embedding leaves goes to other parts."""
    limit = open_bundle(tiny_bundle("two_layers", "cpu", "int4")).manifest.bytes
    tuned = tune(tiny_checkpoint("two_layers"), Budget(what="size", limit=limit), FEW, tokens=512)
    bundle = compile(tiny_checkpoint("two_layers"), tmp_path / "bundle", tuned.recipe, jobs=1)
    assert 0.9 * limit < bundle.manifest.bytes == tuned.bytes <= limit
    assert {one.choice.weights for one in tuned.chosen} > {"int4"}
    alike = [one.kl for one in generous.tried if one.choice == Choice(weights="int4", group_size=32, method="gptq")]
    assert 0 < tuned.sum_of_parts < sum(alike)


def test_a_divergence_is_kept(tiny_checkpoint: TinyCheckpoint, generous: Tuned) -> None:
    limit = 0.5 * sum(one.kl for one in generous.tried if one.choice.weights == "int4") / 5
    tuned = tune(tiny_checkpoint("two_layers"), Budget(what="kl", limit=limit), FEW, tokens=512)
    assert 0.3 * limit < tuned.kl <= limit
    assert tuned.bytes < generous.bytes / 2


COARSE, FINE = (Choice(weights="int4", group_size=size, method="rtn") for size in (128, 32))


def eight_parts() -> list[Tried]:
    parts = [Part(pattern=f"layers.{i}.x", layer=i, parameters=(f"layers.{i}.x",)) for i in range(8)]
    ways = ((COARSE, 1.0, 10), (FINE, 0.1, 20))
    return [Tried(part=part, choice=choice, kl=kl, bytes=size) for part in parts for choice, kl, size in ways]


def twice(chosen: Mapping[Part, Choice]) -> float:
    return 2 * sum(1.0 if choice == COARSE else 0.1 for choice in chosen.values())


def within(limit: float) -> Limit:
    return Limit(load=lambda one: one.kl, value=lambda one: one.bytes, whole=twice, limit=limit, loads_limit=limit)


def test_a_sum_that_does_not_hold_is_corrected() -> None:
    """Parts that are worse together than one by one: the sum's limit is lowered until the whole keeps the budget."""
    chosen = select(eight_parts(), within(8.0))
    assert chosen is not None
    assert sum(one.choice == COARSE for one in chosen) == 3  # 2 * (3 + 0.5) = 7; four would be 8.8


def test_no_choice_is_told() -> None:
    assert select(eight_parts(), within(0.7)) is None  # fine alone, 8 * 0.1, is more
    assert select(eight_parts(), within(1.0)) is None  # and together even twice that


def test_the_better_method_is_taken() -> None:
    part = eight_parts()[0].part
    methods = [dataclasses.replace(FINE, method=method) for method in ("rtn", "hqq", "gptq")]
    tried = [Tried(part=part, choice=c, kl=kl, bytes=20) for c, kl in zip(methods, (3.0, 1.0, 2.0), strict=True)]
    chosen = select(tried, dataclasses.replace(within(9.0), whole=lambda chosen: 1.0))
    assert chosen is not None and chosen[0].choice.method == "hqq"


def test_what_cannot_be_tuned_is_refused(
    tiny_checkpoint: TinyCheckpoint, published_checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def f(): pass\n" * 40)
    budget = Budget(what="size", limit=1e9)
    with pytest.raises(InputError, match="nothing is left to calibrate on"):
        tune(tiny_checkpoint("scout"), budget, dataclasses.replace(FEW, calibration=str(text)), tokens=512)
    with pytest.raises(InputError, match=r"quantized already \(int4 g32\), so there is nothing to choose"):
        tune(published_checkpoint("scout", "int4 g32")[0], budget, FEW)
    with pytest.raises(InputError, match="engines of tensorrt store all matrices but the experts alike"):
        tune(tiny_checkpoint("scout"), budget, dataclasses.replace(FEW, target="tensorrt"))


def test_calibrated_methods_are_told_apart(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """GPTQ's statistics reach the matrices they are of: it beats plain rounding on inputs like those it saw."""
    checkpoint = open_checkpoint(tiny_checkpoint("guard"))
    ids = np.random.default_rng(3).integers(0, 256, (16, 64))
    statistics = statistics_of(checkpoint, tmp_path, "test")
    gather(checkpoint, ids, statistics, products="whole")
    meter = Meter(checkpoint, statistics, ids)
    parts = parts_of(checkpoint.config, checkpoint.names)[1:]  # nothing calibrates the embedding
    gptq = dataclasses.replace(INT4, method="gptq")
    assert meter.divergence(dict.fromkeys(parts, gptq)) < 0.8 * meter.divergence(dict.fromkeys(parts, INT4))
