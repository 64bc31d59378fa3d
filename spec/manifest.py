"""What a bundle says about itself: `manifest.json`, validated field by field, its files listed with size and SHA-256."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from corral.spec.errors import InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import ModelConfig
from corral.spec.read_record import read_record
from corral.spec.recipe import Recipe
from corral.spec.unfinished import read_journal

MANIFEST_NAME = "manifest.json"
FORMAT_MAJOR, FORMAT_MINOR = 1, 0
Stage = Literal["exported", "quantized", "lowered", "ready"]
# The largest manifest that is read: a hostile file must not fill memory.
MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the bundle; `path` is relative, with forward slashes, and stays inside."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One ONNX graph: `path`, and the half-open range of decoder layers it computes."""

    path: str
    first_layer: int
    end_layer: int


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One engine, built of `graph` for the compute capabilities listed; `sidecar` is what is known of its inside, as JSON."""

    path: str
    sidecar: str
    graph: str
    capabilities: tuple[str, ...]
    built_with: str  # "tensorrt_rtx 1.7.1.116"; another version does not open it
    profiles: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A row-major tensor in a file of the bundle: the embedding table, which the runtime gathers from a memory map.

    A quantized table is `uint8` of 8-bit codes, or of 4-bit ones in pairs (the first in the low nibble), beside scales of
    groups of a row: value = scale * (code - 2**(bits - 1)).
    """

    path: str
    dtype: str  # float32, float16, bfloat16, or uint8 where there are scales
    shape: tuple[int, ...]
    offset: int  # bytes


@dataclass(frozen=True, kw_only=True)
class CoverageRecord:
    """How the weights of one kind (`experts`, `attention`, …) are stored."""

    kind: str
    stored: str  # "int4 g128", "float32", …
    matrices: int
    parameters: int
    bytes: int
    published: str = ""  # how the checkpoint stores them where it is quantized: "int4 g128", "fp8 per output", …
    fallbacks: int = 0  # of the matrices, those quantized by another method: see the calibration's list


@dataclass(frozen=True, kw_only=True)
class FallbackRecord:
    """An expert that too few tokens of the calibration text visited, and by which method it was quantized instead."""

    weight: str
    expert: int
    tokens: int
    method: str


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """What the weights were calibrated on. `sha256` is the text's, "" where token ids were made up."""

    text: str
    sha256: str
    tokens: int
    window: int  # tokens; each window starts without context
    expert_tokens: dict[str, tuple[int, ...]]  # a layer's experts -> how many tokens visited each
    min_tokens: int  # fewer visits than this are a fallback
    fallbacks: tuple[FallbackRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A bundle's description.

    `stage` is "ready" for a bundle that runs; "exported" and "quantized" hold graph and plan; "lowered" has its weights,
    too, but none of the engines that its target needs.
    """

    format: str  # "major.minor"
    corral: str  # version that wrote it
    stage: Stage
    model: ModelConfig
    recipe: Recipe
    requires: dict[str, str]  # package -> minimum version
    source: dict[str, str]  # where the checkpoint came from
    graphs: tuple[GraphRecord, ...]
    kv: tuple[KvLayout, ...]
    embedding: TensorRecord | None
    coverage: tuple[CoverageRecord, ...]
    tokenizer: str | None  # path of tokenizer.json
    chat_template: str | None  # path of the Jinja template
    embedding_scales: TensorRecord | None = None  # of a quantized table
    calibration: CalibrationRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token …, for the template
    files: tuple[FileRecord, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files)

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a bundle's manifest. Raises InputError: missing, malformed, another major version, a path outside."""
    path = directory / MANIFEST_NAME
    if not directory.exists():
        raise InputError(f"{directory} does not exist; expected a bundle made by `corral compile`.")
    if not path.is_file():
        if (unfinished := read_journal(directory)) is not None:
            raise InputError(
                f"{directory} is an unfinished compile ({unfinished}). "
                "Run the same `corral compile` command again to finish it, or add --fresh to start over."
            )
        raise InputError(
            f"{directory} holds no {MANIFEST_NAME}: it is no bundle, or an unfinished compile. "
            "Run `corral compile CHECKPOINT -o OUT` to make one."
        )
    if path.stat().st_size > MANIFEST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MANIFEST_BYTES}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}. The bundle is damaged: compile it again.") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a JSON {type(data).__name__}, expected an object.")
    major = str(data.get("format", "")).partition(".")[0]
    if major != str(FORMAT_MAJOR):
        raise InputError(
            f"{path} is of bundle format {data.get('format')!r}; this corral reads {FORMAT_MAJOR}.x. "
            "Compile the checkpoint again, or install the corral version that made it."
        )
    manifest = read_record(Manifest, data, str(path))
    for record in manifest.files:
        inside_path(record.path, path)
    listed = {record.path for record in manifest.files}
    tables = [table.path for table in (manifest.embedding, manifest.embedding_scales) if table]
    texts = [name for name in (manifest.tokenizer, manifest.chat_template) if name is not None]
    engines = [name for engine in manifest.engines for name in (engine.path, engine.sidecar)]
    for name in (*(graph.path for graph in manifest.graphs), *engines, *tables, *texts):
        inside_path(name, path)
        if name not in listed:
            raise InputError(f'{path} names "{name}" but does not list it among its files: the manifest is damaged.')
    return manifest


def inside_path(name: str, manifest: Path) -> PurePosixPath:
    """`name` as a relative path that stays inside the bundle. Raises InputError otherwise."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise InputError(
            f"{manifest} names the file {name!r}, which is outside the bundle; such a bundle is not opened."
        )
    return path
