"""The compile's stages by themselves: each reads and writes a bundle directory; only the last one reads the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx_ir as ir

from corral.exporter.export import export
from corral.exporter.planned_tensor import replace_initializer
from corral.graphs.calibrate.calibrate import calibration_key
from corral.graphs.execute.execution import Execution
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.out_directory import PLAN_FILE, check_out
from corral.graphs.pipeline import LOWER, QUANTIZE, SIMPLIFY, run_phase
from corral.graphs.write_bundle import write_bundle
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.manifest import Stage
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import WeightPlan

UNQUANTIZED = Recipe(target="portable", weights="fp32")


def export_stage(
    checkpoint: str | Path, out: str | Path, *, fresh: bool = False, progress: Progress = silent
) -> Bundle:
    """Capture a checkpoint's graph, simplified, and plan its weights."""
    check_out(Path(out), fresh=fresh)
    source = open_checkpoint(Path(checkpoint), progress=progress)
    model, plan = export(source)
    work = ModelAndPlan(model, plan, source.config, UNQUANTIZED)
    run_phase(SIMPLIFY, work)
    return write_bundle(work, source, Path(out), stage="exported", fresh=fresh, progress=progress)


def quantize_stage(
    bundle: str | Path, out: str | Path, recipe: Recipe, *, fresh: bool = False, progress: Progress = silent
) -> Bundle:
    """Decide how each weight of an exported bundle is quantized."""
    check_out(Path(out), fresh=fresh)
    work, source = _open_stage(Path(bundle), "exported", recipe, progress)
    run_phase(QUANTIZE, work)
    return write_bundle(work, source, Path(out), stage="quantized", fresh=fresh, progress=progress)


def lower_stage(
    bundle: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    fresh: bool = False,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Lower a quantized bundle to the recipe's target, compute its weights and write the finished bundle."""
    how = Execution(jobs=jobs, ray=ray)
    check_out(Path(out), fresh=fresh)
    work, source = _open_stage(Path(bundle), "quantized", recipe, progress)
    run_phase(LOWER[recipe.lowering], work)
    return write_bundle(work, source, Path(out), fresh=fresh, how=how, progress=progress)


def _open_stage(directory: Path, stage: Stage, recipe: Recipe, progress: Progress) -> tuple[ModelAndPlan, Checkpoint]:
    bundle = open_bundle(directory)
    manifest = bundle.manifest
    if manifest.stage != stage:
        makes = {"exported": "export", "quantized": "quantize"}[stage]
        raise InputError(
            f'{directory} is at stage "{manifest.stage}", expected "{stage}". Make one with `corral {makes}`.'
        )
    checkpoint = open_checkpoint(Path(manifest.source["checkpoint"]), progress=progress)
    plan = WeightPlan.from_json(json.loads(bundle.path(PLAN_FILE).read_text(encoding="utf-8")))
    model = ir.load(bundle.path(manifest.graphs[0].path))
    for entry in plan:
        if entry.weight != EMBEDDING:
            replace_initializer(model.graph, model.graph.initializers[entry.name], entry)
    if stage == "quantized":  # its weights are decided; only the target is open
        recipe = dataclasses.replace(manifest.recipe, target=recipe.target)
    key = calibration_key(checkpoint, recipe)
    return ModelAndPlan(model, plan, checkpoint.config, recipe, key), checkpoint
