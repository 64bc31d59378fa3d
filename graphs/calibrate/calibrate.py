"""Gather what a plan's steps need to know of a calibration text, and say in the manifest what that was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from corral.graphs.calibrate.calibration_text import CalibrationText, read_calibration_text
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.input_scales import search_input_scales
from corral.graphs.calibrate.input_sums import Products
from corral.graphs.calibrate.statistics import Statistics, statistics_of
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.methods import CALIBRATED_STEPS, METHODS, MIN_TOKENS, needs_text
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.manifest import CalibrationRecord, FallbackRecord
from corral.spec.model_config import ModelConfig
from corral.spec.progress import Progress, silent
from corral.spec.quant_scheme import GROUP_SIZES, in_words
from corral.spec.recipe import Recipe


@dataclass(frozen=True)
class Calibration:
    """Gathered statistics, and their record for the manifest."""

    statistics: Statistics
    record: CalibrationRecord


def calibration_key(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The name that a plan gives to its statistics; "" where nothing of the recipe needs any."""
    if not needs_text(recipe):
        return ""
    return read_calibration_text(checkpoint, recipe).key(checkpoint, _settings(recipe))


def _settings(recipe: Recipe) -> str:
    """What is gathered follows from these; AWQ's scales are searched for one scheme."""
    if not METHODS[recipe.method].rescales:
        return _products(recipe)
    rules = "".join(f" {rule}" for rule in recipe.rules)
    return f"{recipe.method} {in_words(recipe.weights, recipe.group_size, recipe.asymmetric)}{rules}"


def _products(recipe: Recipe) -> Products:
    """The most that a method of the recipe wants of X^T X."""
    wanted = {METHODS[method].products for method in recipe.methods}
    return next(products for products in ("whole", "blocks", "none") if products in wanted)


def calibrate(
    work: ModelAndPlan, checkpoint: Checkpoint, directory: Path, progress: Progress = silent
) -> Calibration | None:
    """Gather the plan's statistics in `directory`, going on with what is there; None where the plan names none.

    Raises InputError where the text is not the one that the plan was made for, EnvironmentProblem where the disk is full.
    """
    keys = {str(dict(step.args)["statistics"]) for entry in work.plan for step in entry.steps if _needs(step.args)}
    if not keys:
        return None
    text = read_calibration_text(checkpoint, work.recipe)
    if keys != {text.key(checkpoint, _settings(work.recipe))}:
        raise InputError(
            f"the calibration text {text.name}, or the checkpoint, has changed since this plan was made. Run `corral "
            "quantize` again, or `corral compile`."
        )
    statistics = statistics_of(checkpoint, directory, keys.pop())
    products = _products(work.recipe)
    _check_disk_space(directory, work.config, text, products)
    gather(checkpoint, text.ids, statistics, products=products, progress=progress)
    if METHODS[work.recipe.method].rescales:
        search_input_scales(checkpoint, statistics, work.recipe, progress)
    return Calibration(statistics, _record(work, text, statistics))


def statistics_bytes(config: ModelConfig, tokens: int, products: Products) -> int:
    """Disk space for a calibration, at most: what is kept of every matrix's X^T X, hidden states of three points of a layer."""

    def kept(inputs: int, experts: int = 0) -> int:
        """Of one matrix, or of all experts of a layer: their tokens are shared out, so few of them can have many."""
        most = max(experts, 1) * inputs * {"whole": inputs, "blocks": max(GROUP_SIZES), "none": 0}[products]
        visits = tokens * (config.num_experts_per_tok if experts else 1)
        return min(most, 2 * visits * inputs) if products == "whole" else most

    numbers = kept(config.hidden_size) + 3 * tokens * config.hidden_size
    for layer in config.layers:
        attention = kept(config.hidden_size) + kept(config.query_size)
        dense = config.intermediate_size if layer.moe else config.intermediate_size_mlp
        numbers += attention + kept(config.hidden_size) + kept(dense)
        if layer.moe:
            numbers += sum(
                kept(size, config.num_local_experts) for size in (config.hidden_size, config.intermediate_size)
            )
    return 4 * numbers


def _needs(args: tuple[tuple[str, int | float | str], ...]) -> bool:
    return "statistics" in dict(args)


def _check_disk_space(directory: Path, config: ModelConfig, text: CalibrationText, products: Products) -> None:
    had = sum(path.stat().st_size for path in directory.glob("*-*") if path.name.startswith(("statistics", "hidden")))
    needed, free = statistics_bytes(config, text.ids.size, products) - had, shutil.disk_usage(directory).free
    if needed > free:
        raise EnvironmentProblem(
            f"{directory} needs {needed / 1e9:.1f} GB more for the statistics of the calibration (they are removed at the "
            f"end), but its disk has {free / 1e9:.1f} GB free. Make room, give fewer --calibration-tokens, or use --weights "
            "int4 with --method rtn-mse, which needs none."
        )


def _record(work: ModelAndPlan, text: CalibrationText, statistics: Statistics) -> CalibrationRecord:
    config = work.config
    seen = {
        f"layers.{i}.feed_forward.experts": tuple(
            statistics.tokens(f"layers.{i}.feed_forward.experts.gate_up_proj", e)
            for e in range(config.num_local_experts)
        )
        for i, layer in enumerate(config.layers)
        if layer.moe
    }
    calibrated = {
        entry.weight.rpartition(".")[0] for entry in work.plan for step in entry.steps if step.name in CALIBRATED_STEPS
    }
    return CalibrationRecord(
        text=text.name,
        sha256=text.sha256,
        tokens=text.ids.size,
        window=text.ids.shape[1],
        expert_tokens=seen,
        min_tokens=MIN_TOKENS,
        fallbacks=tuple(
            FallbackRecord(weight=name, expert=expert, tokens=tokens, method="rtn-mse")
            for name, counts in seen.items()
            if name in calibrated  # and not kept as published
            for expert, tokens in enumerate(counts)
            if tokens < MIN_TOKENS
        ),
    )
