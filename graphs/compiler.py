"""Checkpoint -> bundle. This file is the summary of corral: open, export, pass by pass to the target, execute, write."""

from __future__ import annotations

from pathlib import Path

from corral.exporter.export import Exported, export
from corral.graphs.calibrate.calibrate import calibration_key
from corral.graphs.engine.engines import build_engines, waiting_for_engines
from corral.graphs.engine.tensorrt_module import check_installed
from corral.graphs.execute.execution import Execution
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.out_directory import check_out
from corral.graphs.pipeline import phases, run_phase
from corral.graphs.write_bundle import made_of, write_bundle
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.bundle import Bundle
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.target import target_named
from corral.spec.weight_plan import WeightPlan


def compile(
    checkpoint: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    fresh: bool = False,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Compile a checkpoint directory into a bundle at `out`; `fresh` replaces a bundle that is there.

    `jobs` processes compute the weights (None: as many as pay off), here or on the Ray cluster at `ray` (HOST:PORT).
    Killed at any moment, the same call goes on.
    Where the recipe names a GPU, its engines are built, too (`corral.graphs.engine.engines`).
    Raises InputError for a bad checkpoint, recipe or output directory, EnvironmentProblem where the disk is too small.
    """
    how = Execution(jobs=jobs, ray=ray)
    engine = target_named(recipe.target).engine if recipe.capabilities else None
    if engine:
        check_installed(engine)  # before hours of work, not after
    waiting = waiting_for_engines(Path(out), recipe) if engine and not fresh else None
    if waiting is None:
        check_out(Path(out), fresh=fresh)  # seconds before write_bundle would notice
    source = open_checkpoint(Path(checkpoint), progress=progress)
    if waiting is None or not made_of(waiting, source):
        work = lower(source, recipe, progress=progress)
        waiting = write_bundle(work, source, Path(out), fresh=fresh, how=how, progress=progress)
    return build_engines(out, progress=progress) if engine else waiting


def lower(
    checkpoint: Checkpoint, recipe: Recipe, *, captured: Exported | None = None, progress: Progress = silent
) -> ModelAndPlan:
    """Graph and plan for `recipe`'s target, of a checkpoint whose headers alone are read.

    `captured` is what `export` gave for this checkpoint, where several recipes share it: it stays as it is.
    """
    statistics = calibration_key(checkpoint, recipe)  # first: a text that does not do is told at once
    if captured is None:
        progress("capture", 0, 0, "")
        model, plan = export(checkpoint)
    else:
        model, plan = captured[0].clone(), WeightPlan(dict(captured[1].entries))
    work = ModelAndPlan(model, plan, checkpoint.config, recipe, statistics)
    for phase in phases(recipe.lowering):
        run_phase(phase, work)
    return work
