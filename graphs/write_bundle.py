"""A finished graph and plan -> a bundle directory: weights, graph, tokenizer, then the manifest, last.

Every file is written under a temporary name, synced and renamed. Where anything fails, what was written is removed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from corral.exporter.bind_weights import EMBEDDING_ENTRY
from corral.graphs.coverage import coverage
from corral.graphs.execute.execute import execute
from corral.graphs.execute.shards import PARTIAL, shard_name, shard_sizes
from corral.graphs.graph_file import graph_bytes
from corral.graphs.model_and_plan import ModelAndPlan
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.bundle import Bundle, remember_verified
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.kv_layout import kv_layouts
from corral.spec.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    MANIFEST_NAME,
    FileRecord,
    GraphRecord,
    Manifest,
    Stage,
    TensorRecord,
)
from corral.spec.progress import Progress, silent
from corral.spec.target import target_named

GRAPH_FILE, PLAN_FILE, TOKENIZER_FILE, TEMPLATE_FILE = (
    "decoder.onnx",
    "plan.json",
    "tokenizer.json",
    "chat_template.jinja",
)


def write_bundle(
    work: ModelAndPlan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    stage: Stage = "ready",
    fresh: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write `out`. A bundle of an earlier stage ("exported", "quantized") holds graph and plan, and no weights.

    Raises InputError where `out` holds something else or a weight is damaged, EnvironmentProblem where the disk is full.
    """
    placements = work.plan.placements()
    sizes = shard_sizes(placements) if stage == "ready" else {}
    with _directory_for_bundle(out, fresh=fresh):
        _check_disk_space(out, sum(sizes.values()))
        names = execute(work.plan, out, checkpoint.read, progress=progress) if stage == "ready" else []
        names.append(_write(out, GRAPH_FILE, graph_bytes(work, placements)))
        names.append(_write(out, PLAN_FILE, json.dumps(work.plan.to_json(), separators=(",", ":")).encode()))
        tokenizer, template = checkpoint.tokenizer_path, checkpoint.chat_template()
        if tokenizer is not None:
            names.append(_write(out, TOKENIZER_FILE, tokenizer.read_bytes()))
        if template is not None:
            names.append(_write(out, TEMPLATE_FILE, template.encode()))
        embedding, place = work.plan.entries[EMBEDDING_ENTRY], placements[EMBEDDING_ENTRY]
        manifest = Manifest(
            format=f"{FORMAT_MAJOR}.{FORMAT_MINOR}",
            corral=version("corral"),
            stage=stage,
            model=dataclasses.replace(work.config, eos_token_ids=checkpoint.eos_token_ids),
            recipe=work.recipe,
            requires=dict(target_named(work.recipe.target).requires),
            source=_provenance(checkpoint, stage),
            graphs=(GraphRecord(path=GRAPH_FILE, first_layer=0, end_layer=work.config.num_layers),),
            kv=kv_layouts(work.config),
            embedding=TensorRecord(
                path=shard_name(place.shard), dtype=embedding.dtype, shape=embedding.shape, offset=place.offset
            )
            if stage == "ready"
            else None,
            coverage=coverage(work.plan),
            tokenizer=TOKENIZER_FILE if tokenizer is not None else None,
            chat_template=TEMPLATE_FILE if template is not None else None,
            special_tokens=checkpoint.special_tokens(),
            files=tuple(_record(out, name, progress) for name in names),
        )
        _write(out, MANIFEST_NAME, manifest.dumps().encode())
    bundle = Bundle(out, manifest)
    remember_verified(bundle)
    return bundle


def check_out(out: Path, *, fresh: bool) -> None:
    """Raise InputError unless a bundle may be written to `out`: new, empty, or with `fresh` an older bundle."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; expected a directory to write the bundle into. Choose another -o.")
    if any(out.iterdir()):
        if not (out / MANIFEST_NAME).is_file():
            raise InputError(
                f"{out} holds something that is no bundle ({next(out.iterdir()).name}, …); it is left as it is. "
                "Choose another -o, or an empty directory."
            )
        if not fresh:
            raise InputError(f"{out} holds a bundle already. Choose another -o, or add --fresh to replace it.")


@contextmanager
def _directory_for_bundle(out: Path, *, fresh: bool) -> Iterator[None]:
    """A directory to write a bundle into. Emptied again on failure."""
    check_out(out, fresh=fresh)
    existed = out.exists()
    if existed:
        _remove_files(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if out.is_dir():
            _remove_files(out)
            if not existed:
                out.rmdir()
        if isinstance(error, OSError) and not isinstance(error, CorralError):
            raise _disk_error(out, error) from error
        raise


def _remove_files(out: Path) -> None:
    """Remove a bundle's files, and nothing that corral did not write."""
    ours = (GRAPH_FILE, PLAN_FILE, TOKENIZER_FILE, TEMPLATE_FILE, MANIFEST_NAME)
    for path in out.iterdir():
        name = path.name.removesuffix(PARTIAL)
        if name in ours or (name.startswith("weights-") and name.endswith(".bin")):
            path.unlink()


def _disk_error(out: Path, error: OSError) -> EnvironmentProblem:
    if error.errno == errno.ENOSPC:
        return EnvironmentProblem(
            f"the disk of {out} is full; what was written is removed. Make room and run it again."
        )
    return EnvironmentProblem(f"{out} cannot be written: {error}.")


def _check_disk_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise EnvironmentProblem(
            f"{out} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. Make room, or choose another -o."
        )


def _write(out: Path, name: str, data: bytes) -> str:
    path = out / (name + PARTIAL)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, out / name)
    return name


def _record(out: Path, name: str, progress: Progress) -> FileRecord:
    path = out / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=name, bytes=path.stat().st_size, sha256=digest)


def _provenance(checkpoint: Checkpoint, stage: Stage) -> dict[str, str]:
    """Which checkpoint this came from. An unfinished stage must find it again; a finished bundle is free of paths."""
    source = {"name": Path(checkpoint.location).name, "config_sha256": checkpoint.config_sha256}
    return source if stage == "ready" else {**source, "checkpoint": checkpoint.location}
