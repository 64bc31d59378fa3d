"""A lowered bundle -> the same bundle with engines in it: built one after the other, then the manifest, last."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from corral.graphs.engine.build import EngineSettings, build_engine, sidecar
from corral.graphs.engine.finished import DIGEST, KEY, build_key, find_finished
from corral.graphs.engine.profiles import profiles_for
from corral.graphs.engine.tensorrt_module import check_installed
from corral.graphs.hash_files import hash_files
from corral.graphs.out_directory import locked, write_file
from corral.spec.bundle import Bundle, open_bundle, remember_verified
from corral.spec.errors import InputError
from corral.spec.manifest import MANIFEST_NAME, EngineRecord, FileRecord, GraphRecord, read_manifest
from corral.spec.progress import Progress, silent
from corral.spec.recipe import Recipe
from corral.spec.target import TARGETS, target_named


def build_engines(
    directory: str | Path, *, gpu: str = "", target: str = "", fresh: bool = False, progress: Progress = silent
) -> Bundle:
    """Build the engines of a bundle for `gpu` (as in a recipe; empty: the recipe's own) and list them in its manifest.

    `target`: whose module builds them, where that is not the recipe's: a graph without plugins is the same for all.

    One engine a graph serves all the compute capabilities named together. One that is there, built of the same graph
    and weights by the same version, is kept (with `fresh` built again), so that a call that was killed goes on; those
    for other GPUs stay. Raises InputError for a bundle whose target has no engines or a GPU that it does not build for,
    EnvironmentProblem without the package or memory, CheckFailed where a built engine is not as it should be; the
    manifest is then as it was, and stages that were built before are kept for the next call.
    """
    bundle = open_bundle(directory, progress=progress)
    recipe = _recipe(bundle, gpu, target)
    module = target_named(recipe.target).engine
    assert module is not None
    check_installed(module)
    settings = EngineSettings(
        module=module,
        capabilities=recipe.capabilities,
        profiles=profiles_for(recipe, bundle.manifest.kv),
        weight_streaming=recipe.weight_streaming,
    )
    with locked(bundle.directory):
        built = [_build(bundle, graph, settings, fresh, progress) for graph in bundle.manifest.graphs]
        return _listed(bundle, recipe, [record for record, _ in built], [file for _, files in built for file in files])


def waiting_for_engines(directory: Path, recipe: Recipe) -> Bundle | None:
    """The bundle that a compile of `recipe` leaves when it is killed while it builds engines; None where there is none."""
    try:
        manifest = read_manifest(directory)
    except InputError:
        return None
    mine = manifest.stage == "lowered" and manifest.recipe == recipe and manifest.corral == version("corral")
    return Bundle(directory, manifest) if mine else None


def _recipe(bundle: Bundle, gpu: str, target: str) -> Recipe:
    manifest = bundle.manifest
    able = " or ".join(name for name, other in TARGETS.items() if other.engine)
    if target and not target_named(target).engine:
        raise InputError(f"target {target} has no engines to build; expected {able}.")
    if not target_named(manifest.recipe.target).engine:
        raise InputError(
            f"{bundle.directory} is for target {manifest.recipe.target}, which has no engines. "
            f"Compile the checkpoint with --target {able}."
        )
    if manifest.stage not in ("lowered", "ready"):
        raise InputError(
            f'{bundle.directory} is at stage "{manifest.stage}", expected "lowered". Run `corral lower` on it first.'
        )
    recipe = manifest.recipe
    recipe = dataclasses.replace(recipe, gpu=gpu or recipe.gpu, target=target or recipe.target)
    if not recipe.capabilities:
        raise InputError(
            f"{bundle.directory} does not say which GPU to build for. Add --gpu, for example --gpu rtx4090 or --gpu 8.9."
        )
    return recipe


def _build(
    bundle: Bundle, graph: GraphRecord, settings: EngineSettings, fresh: bool, progress: Progress
) -> tuple[EngineRecord, tuple[FileRecord, ...]]:
    stem = f"{PurePosixPath(graph.path).stem}.{'-'.join('sm' + c.replace('.', '') for c in settings.capabilities)}"
    engine, beside = f"{stem}.engine", f"{stem}.engine.json"
    key = build_key(bundle, graph.path, settings)
    found = None if fresh else find_finished(bundle, engine, beside, key, progress)
    if found is None:
        progress(f"build {engine}", 0, 0, "")
        about = sidecar(build_engine(bundle.path(graph.path), engine, settings), graph.path, settings)
        (file,) = hash_files(bundle.directory, [engine], progress=progress)
        about |= {KEY: key, DIGEST: file.sha256}
        write_file(bundle.directory, beside, (json.dumps(about, indent=1) + "\n").encode())
        found = about, file
    about, file = found
    record = EngineRecord(
        path=engine,
        sidecar=beside,
        graph=graph.path,
        capabilities=settings.capabilities,
        built_with=about["built_with"],
        profiles=tuple(profile.name for profile in settings.profiles),
    )
    return record, (file, *hash_files(bundle.directory, [beside]))


def _listed(bundle: Bundle, recipe: Recipe, engines: list[EngineRecord], files: list[FileRecord]) -> Bundle:
    """The bundle with the new engines in its manifest, beside those it had."""
    manifest, new = bundle.manifest, {record.path for record in files}
    kept = tuple(engine for engine in manifest.engines if engine.path not in new)
    gpus = dict.fromkeys(gpu for engine in (*kept, *engines) for gpu in engine.capabilities)
    listed = dataclasses.replace(
        manifest,
        stage="ready",
        recipe=dataclasses.replace(recipe, gpu=",".join(gpus)),
        requires=recipe.requires,
        engines=(*kept, *engines),
        files=(*(record for record in manifest.files if record.path not in new), *files),
    )
    write_file(bundle.directory, MANIFEST_NAME, listed.dumps().encode())
    finished = Bundle(bundle.directory, listed)
    remember_verified(finished)
    return finished
