"""tune(checkpoint, budget) -> Tuned: measure every part in every storage, and take the best sum within the budget."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corral.graphs.calibrate.calibration_text import WINDOW, CalibrationText, read_calibration_text
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.statistics import statistics_of
from corral.graphs.quantize.methods import METHODS
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.errors import InputError
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.target import target_named
from corral.tune.choice import METHODS_TRIED, STORAGES, Choice
from corral.tune.limits import limit_of
from corral.tune.parts import Part, parts_of
from corral.tune.recipe_file import as_recipe
from corral.tune.select import lightest, select
from corral.tune.sensitivity import Meter
from corral.tune.sizes import Sizes
from corral.tune.speed import Speeds
from corral.tune.timer import BuildTimer, Timer
from corral.tune.tuned import Budget, Tried, Tuned
from corral.validate.latency import PROMPT_TOKENS

TOKENS = 8192  # on which divergence is measured


def tune(
    checkpoint: str | os.PathLike[str],
    budget: Budget,
    recipe: Recipe,
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    timer: Timer | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Choose weights, group size and method of every part of a checkpoint; `recipe` says the rest: target, kernels, text.

    Divergence is measured on the `tokens` of the recipe's text that follow those it calibrates on. It is that of the
    weights: activations are float32. Memory: `corral.tune.sensitivity.Meter`. Speed is what `timer` says, or builds that are
    compiled and timed here. Raises InputError for a checkpoint that is quantized already, for a text that is too short, and
    where no choice keeps the budget.
    """
    if target_named(recipe.target).engine:
        raise InputError(
            f"corral tune chooses among kernels of ONNX Runtime; engines of {recipe.target} store all matrices but the "
            "experts alike. Give --target cpu, or write the recipe by hand."
        )
    source = open_checkpoint(Path(checkpoint), progress=progress)
    parts = parts_of(source.config, source.names)
    _check_floats(source, parts)
    calibrated, held_out, recipe, text = _texts(source, recipe, tokens)
    sizes, speeds = Sizes(source, recipe), None
    if budget.what == "tokens-per-second":
        prompt = held_out[0, :PROMPT_TOKENS].tolist()
        how = {"prompt": prompt, "threads": threads, "progress": progress}
        speeds = Speeds(sizes, parts, timer or BuildTimer(checkpoint=Path(checkpoint), recipe=recipe, **how))
        speeds.check(budget)
    with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
        statistics = statistics_of(source, Path(scratch), "tune")
        gather(source, calibrated, statistics, products="whole", progress=progress)
        meter = Meter(source, statistics, held_out)
        within = limit_of(budget, parts, meter, sizes, speeds)
        tried = _try_all(meter, sizes, parts, progress)
        progress("choose", 0, 0, "")
        chosen = select(tried, within)
        if chosen is None:
            least = budget.amount(within.whole({one.part: one.choice for one in lightest(tried, within)}))
            raise InputError(
                f"no choice of weights takes {budget}: the least that was found takes {least}. Give more room."
            )
        choices = {one.part: one.choice for one in chosen}
        kl = meter.divergence(choices)
    return Tuned(
        budget=budget,
        recipe=as_recipe(recipe, choices),
        chosen=tuple(chosen),
        tried=tuple(tried),
        kl=kl,
        bytes=sizes.bundle(choices),
        tokens_per_second=speeds.timed_again(choices) if speeds else None,
        tokens=held_out.size,
        text=text.name,
    )


def _try_all(meter: Meter, sizes: Sizes, parts: Sequence[Part], progress: Progress) -> list[Tried]:
    """Every part in every storage that fits it, in the order of the layers.

    Which method is best is tried at the largest group, where they differ most, and taken for the others.
    """
    tried: list[Tried] = []
    for done, part in enumerate(parts):
        progress("measure", done, len(parts), "parts")
        for weights, methods in METHODS_TRIED.items():
            methods = tuple(one for one in methods if not (part.is_table and METHODS[one].calibrated))
            for storage in reversed([one for one in STORAGES if one[0] == weights and sizes.fits(part, one)]):
                found = []
                for method in methods:
                    choice = Choice(weights=weights, group_size=storage[1], method=method)
                    kl = meter.divergence({part: choice})
                    found.append(Tried(part=part, choice=choice, kl=kl, bytes=sizes.stored(part, storage)))
                methods = (min(found, key=lambda one: one.kl).choice.method,)
                tried += found
    progress("measure", len(parts), len(parts), "parts")
    return tried


def _texts(
    checkpoint: Checkpoint, recipe: Recipe, tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Recipe, CalibrationText]:
    """Windows to calibrate on, windows to measure on, the recipe that calibrates on just the first, and their text."""
    longer = dataclasses.replace(recipe, calibration_tokens=recipe.calibration_tokens + tokens)
    text = read_calibration_text(checkpoint, longer)
    measured = max(1, tokens // WINDOW)
    if len(text.ids) <= measured:
        raise InputError(
            f"the calibration text {text.name} gives {text.ids.size} tokens, and {measured * WINDOW} of them are to be "
            "measured on: nothing is left to calibrate on. Give a longer text with --calibration FILE, or fewer --tokens."
        )
    ids = text.ids[:-measured]
    return ids, text.ids[-measured:], dataclasses.replace(recipe, calibration_tokens=ids.size), text


def _check_floats(checkpoint: Checkpoint, parts: Sequence[Part]) -> None:
    for name in (name for part in parts for name in part.parameters):
        if published := checkpoint.info(name).published:
            raise InputError(
                f"the checkpoint stores {name} quantized already ({published}), so there is nothing to choose. Tune the "
                "checkpoint that it was made of, or compile this one as it is."
            )
