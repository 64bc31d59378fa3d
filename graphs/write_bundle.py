"""A finished graph and plan -> a bundle directory: weights, graph, tokenizer, then the manifest, last.

Every file is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from corral.exporter.bind_weights import EMBEDDING_ENTRY, EMBEDDING_SCALES
from corral.graphs.calibrate.calibrate import calibrate
from corral.graphs.coverage import coverage
from corral.graphs.execute.execute import execute
from corral.graphs.execute.execution import Execution
from corral.graphs.execute.job import plan_jobs
from corral.graphs.execute.journal import compile_key
from corral.graphs.execute.shards import Shards, shard_name, shard_sizes
from corral.graphs.graph_file import graph_bytes, plan_bytes
from corral.graphs.hash_files import hash_files
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.out_directory import (
    PLAN_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    bundle_directory,
    write_file,
)
from corral.graphs.split_stages import place_weights, split_stages, whole_graph
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.identity import checkpoint_identity, last_change
from corral.spec.bundle import Bundle, remember_verified
from corral.spec.errors import EnvironmentProblem
from corral.spec.kv_layout import stored_kv_layouts
from corral.spec.machine import usable_cores
from corral.spec.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    MANIFEST_NAME,
    GraphRecord,
    Manifest,
    Stage,
    TensorRecord,
)
from corral.spec.progress import Progress, silent
from corral.spec.target import target_named
from corral.spec.weight_plan import Placement


def write_bundle(
    work: ModelAndPlan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    stage: Stage = "ready",
    fresh: bool = False,
    how: Execution | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write `out`. A bundle of an earlier stage ("exported", "quantized") holds graph and plan, and no weights.

    What an unfinished compile of the same plan and checkpoint left in `out` is gone on with. Raises InputError where
    `out` holds something else or a weight is damaged, EnvironmentProblem where the disk is full or a worker is lost.
    """
    how = how or Execution()
    graphs = split_stages(work) if stage == "ready" else [whole_graph(work)]
    placements = place_weights(work, graphs)
    jobs = plan_jobs(work.plan, placements, how.job_elements) if stage == "ready" else []
    shards = Shards(out, shard_sizes(placements) if stage == "ready" else {})
    key = compile_key(jobs, stage, version("corral"), checkpoint_identity(checkpoint))
    with bundle_directory(out, key=key, what=_in_words(work, checkpoint), jobs=len(jobs), fresh=fresh) as journal:
        _check_disk_space(shards)
        calibration = calibrate(work, checkpoint, out, progress) if stage == "ready" else None
        known = calibration.statistics.of if calibration else None
        names = execute(jobs, shards, checkpoint.read_piece, journal, how, progress, known)
        for graph in graphs:
            names.append(write_file(out, graph.path, graph_bytes(graph.model, work.plan, placements)))
        names.append(write_file(out, PLAN_FILE, plan_bytes(work.plan)))
        tokenizer, template = checkpoint.tokenizer(), checkpoint.chat_template()
        if tokenizer is not None:
            names.append(write_file(out, TOKENIZER_FILE, tokenizer))
        if template is not None:
            names.append(write_file(out, TEMPLATE_FILE, template.encode()))
        tables = _tables(work, placements) if stage == "ready" else {}
        manifest = Manifest(
            format=f"{FORMAT_MAJOR}.{FORMAT_MINOR}",
            corral=version("corral"),
            stage="lowered" if stage == "ready" and target_named(work.recipe.target).engine else stage,
            model=dataclasses.replace(work.config, eos_token_ids=checkpoint.eos_token_ids),
            recipe=work.recipe,
            requires=work.recipe.requires,
            source=_provenance(checkpoint, stage),
            graphs=tuple(
                GraphRecord(path=graph.path, first_layer=graph.layers[0], end_layer=graph.layers[1]) for graph in graphs
            ),
            kv=stored_kv_layouts(work.config, work.recipe),
            embedding=tables.get(EMBEDDING_ENTRY),
            embedding_scales=tables.get(EMBEDDING_SCALES),
            coverage=coverage(work.plan, calibration.record if calibration else None),
            calibration=calibration.record if calibration else None,
            tokenizer=TOKENIZER_FILE if tokenizer is not None else None,
            chat_template=TEMPLATE_FILE if template is not None else None,
            special_tokens=checkpoint.special_tokens(),
            files=hash_files(out, names, threads=how.jobs or usable_cores(), progress=progress),
        )
        if calibration:
            calibration.statistics.remove()
        write_file(out, MANIFEST_NAME, manifest.dumps().encode())
    bundle = Bundle(out, manifest)
    remember_verified(bundle)
    return bundle


def _tables(work: ModelAndPlan, placements: Mapping[str, Placement]) -> dict[str, TensorRecord]:
    """Where the runtime finds what no graph reads."""
    found = {name: work.plan.entries[name] for name in (EMBEDDING_ENTRY, EMBEDDING_SCALES) if name in work.plan.entries}
    return {
        name: TensorRecord(
            path=shard_name(placements[name].shard), dtype=e.dtype, shape=e.shape, offset=placements[name].offset
        )
        for name, e in found.items()
    }


def _in_words(work: ModelAndPlan, checkpoint: Checkpoint) -> str:
    recipe = work.recipe.to_json()
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in recipe.items() if value is not False)
    return f"{checkpoint.name} ({words})"


def _check_disk_space(shards: Shards) -> None:
    needed, free = shards.missing_bytes(), shutil.disk_usage(shards.directory).free
    if needed > free:
        raise EnvironmentProblem(
            f"{shards.directory} needs {needed / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free. "
            "Make room, or choose another -o."
        )


def made_of(bundle: Bundle, checkpoint: Checkpoint) -> bool:
    """Whether a bundle was made of `checkpoint`: by its provenance, and no file of weights is newer than the bundle."""
    written = (bundle.directory / MANIFEST_NAME).stat().st_mtime_ns
    return bundle.manifest.source == _provenance(checkpoint, "ready") and last_change(checkpoint) < written


def _provenance(checkpoint: Checkpoint, stage: Stage) -> dict[str, str]:
    """Which checkpoint this came from. An unfinished stage must find it again; a finished bundle is free of paths."""
    source = {"name": checkpoint.name, "config_sha256": checkpoint.config_sha256}
    if checkpoint.hub is not None and checkpoint.hub.revision is not None:
        source["revision"] = checkpoint.hub.revision
    return source if stage == "ready" else {**source, "checkpoint": checkpoint.location}
