"""Which engines of a bundle are finished: each has a sidecar, written after it, that names what it was built of.

The sidecars are the journal: a build that was killed goes on behind the engines that have theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from corral.graphs.engine.build import EngineSettings
from corral.graphs.engine.tensorrt_module import installed_version
from corral.graphs.hash_files import hash_files
from corral.spec.bundle import Bundle
from corral.spec.manifest import FileRecord
from corral.spec.progress import Progress
from corral.spec.tensorrt_flavors import FLAVORS

KEY, DIGEST = "build_key", "sha256"  # of a sidecar: what the engine was built of, and what came out


def build_key(bundle: Bundle, graph: str, settings: EngineSettings) -> str:
    """SHA-256 over all that decides an engine's bytes: graph and shards by their digests, settings, versions."""
    import onnx

    weights = onnx.load(bundle.path(graph), load_external_data=False).graph.initializer
    shards = {place.value for tensor in weights for place in tensor.external_data if place.key == "location"}
    digests = {record.path: record.sha256 for record in bundle.manifest.files if record.path in {graph, *shards}}
    versions = [version("corral"), installed_version(FLAVORS[settings.module])]
    made_of = [versions, dataclasses.asdict(settings), digests]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def find_finished(
    bundle: Bundle, engine: str, sidecar: str, key: str, progress: Progress
) -> tuple[dict[str, Any], FileRecord] | None:
    """The sidecar and the file of an engine that was built as `key` says and is whole; None where there is none."""
    about = _read(bundle.path(sidecar))
    if about.get(KEY) != key or not bundle.path(engine).is_file():
        return None
    (file,) = hash_files(bundle.directory, [engine], progress=progress)
    return (about, file) if file.sha256 == about.get(DIGEST) else None


def _read(path: Path) -> dict[str, Any]:
    """A sidecar; {} where it is missing or is none."""
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
