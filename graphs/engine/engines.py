"""A lowered bundle -> the same bundle with engines in it: built one after the other, then the manifest, last."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath

from corral.graphs.engine.build import build_engine, sidecar
from corral.graphs.engine.profiles import profiles_for
from corral.graphs.engine.tensorrt_module import check_installed
from corral.graphs.hash_files import hash_files
from corral.graphs.out_directory import locked, write_file
from corral.spec.bundle import Bundle, open_bundle, remember_verified
from corral.spec.errors import InputError
from corral.spec.manifest import MANIFEST_NAME, EngineRecord, FileRecord, GraphRecord
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.target import TARGETS, target_named


def build_engines(directory: str | Path, *, gpu: str = "", progress: Progress = silent) -> Bundle:
    """Build the engines of a bundle for `gpu` (as in a recipe; empty: the recipe's own) and list them in its manifest.

    One engine a graph serves all the compute capabilities named together. An engine that is there for the same ones is
    built again and replaced; others stay. Raises InputError for a bundle whose target has no engines or a GPU that it
    does not build for, EnvironmentProblem without the package or memory, CheckFailed where a built engine is not as
    it should be; the bundle is then as it was.
    """
    bundle = open_bundle(directory, progress=progress)
    recipe = _recipe(bundle, gpu)
    target = target_named(recipe.target)
    assert target.engine is not None
    check_installed(target.engine)
    with locked(bundle.directory):
        built = [_build(bundle, graph, recipe, target.engine, progress) for graph in bundle.manifest.graphs]
        return _listed(bundle, recipe, [record for record, _ in built], [file for _, files in built for file in files])


def _recipe(bundle: Bundle, gpu: str) -> Recipe:
    manifest = bundle.manifest
    if not target_named(manifest.recipe.target).engine:
        able = " or ".join(name for name, target in TARGETS.items() if target.engine)
        raise InputError(
            f"{bundle.directory} is for target {manifest.recipe.target}, which has no engines. "
            f"Compile the checkpoint with --target {able}."
        )
    if manifest.stage not in ("lowered", "ready"):
        raise InputError(
            f'{bundle.directory} is at stage "{manifest.stage}", expected "lowered". Run `corral lower` on it first.'
        )
    recipe = dataclasses.replace(manifest.recipe, gpu=gpu or manifest.recipe.gpu)
    if not recipe.capabilities:
        raise InputError(
            f"{bundle.directory} does not say which GPU to build for. Add --gpu, for example --gpu rtx4090 or --gpu 8.9."
        )
    return recipe


def _build(
    bundle: Bundle, graph: GraphRecord, recipe: Recipe, module: str, progress: Progress
) -> tuple[EngineRecord, tuple[FileRecord, ...]]:
    capabilities = recipe.capabilities
    stem = f"{PurePosixPath(graph.path).stem}.{'-'.join('sm' + c.replace('.', '') for c in capabilities)}"
    progress(f"build {stem}.engine", 0, 0, "")
    profiles = profiles_for(recipe, bundle.manifest.kv)
    engine = build_engine(
        bundle.path(graph.path),
        f"{stem}.engine",
        module=module,
        capabilities=capabilities,
        profiles=profiles,
    )
    about = sidecar(engine, graph=graph.path, capabilities=capabilities, profiles=profiles)
    write_file(bundle.directory, f"{stem}.engine.json", (json.dumps(about, indent=1) + "\n").encode())
    record = EngineRecord(
        path=f"{stem}.engine",
        sidecar=f"{stem}.engine.json",
        graph=graph.path,
        capabilities=capabilities,
        built_with=engine.built.built_with,
        profiles=tuple(profile.name for profile in profiles),
    )
    return record, hash_files(bundle.directory, [record.path, record.sidecar], progress=progress)


def _listed(bundle: Bundle, recipe: Recipe, engines: list[EngineRecord], files: list[FileRecord]) -> Bundle:
    """The bundle with the new engines in its manifest, beside those it had."""
    manifest, new = bundle.manifest, {record.path for record in files}
    kept = tuple(engine for engine in manifest.engines if engine.path not in new)
    gpus = dict.fromkeys(gpu for engine in (*kept, *engines) for gpu in engine.capabilities)
    listed = dataclasses.replace(
        manifest,
        stage="ready",
        recipe=dataclasses.replace(recipe, gpu=",".join(gpus)),
        engines=(*kept, *engines),
        files=(*(record for record in manifest.files if record.path not in new), *files),
    )
    write_file(bundle.directory, MANIFEST_NAME, listed.dumps().encode())
    finished = Bundle(bundle.directory, listed)
    remember_verified(finished)
    return finished
