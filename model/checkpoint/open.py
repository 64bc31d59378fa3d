"""Open a checkpoint directory: decide its format, and hold every tensor's name, shape and dtype against the config."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.expert_tensors import fuse_experts
from corral.model.checkpoint.hub import fetch, hub_name
from corral.model.checkpoint.meta_pth import can_open_meta, open_meta
from corral.model.checkpoint.names import EMBEDDING, HEAD, detect_form, expected_parameters, is_dropped
from corral.model.checkpoint.part import split_part, take_layers
from corral.model.checkpoint.quantization import open_quantized
from corral.model.checkpoint.safetensors import can_open_safetensors, open_safetensors
from corral.model.checkpoint.store import Complaints, TensorStore, listed
from corral.model.checkpoint.synthetic import FORM, is_synthetic, open_synthetic, parse_synthetic
from corral.spec.errors import InputError
from corral.spec.meta_params import PARAMS_NAME
from corral.spec.model_config import ModelConfig, read_config
from corral.spec.progress import Progress, silent

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Format:
    """One way to store a checkpoint in a directory: weights, and the file that says what they are."""

    name: str
    config_name: str
    can_open: Callable[[Path], bool]
    open: Callable[[Path, Complaints], tuple[ModelConfig, TensorStore]]


def _open_hugging_face(
    directory: Path, complaints: Complaints, open_store: Callable[[Path], TensorStore] = open_safetensors
) -> tuple[ModelConfig, TensorStore]:
    config = read_config(directory / CONFIG_NAME)
    store = open_quantized(open_store(directory), directory / CONFIG_NAME, complaints)
    return config, fuse_experts(store, config, complaints)


CONFIG_NAME = "config.json"
FORMATS = (
    Format("safetensors", CONFIG_NAME, can_open_safetensors, _open_hugging_face),
    Format("Meta's consolidated.*.pth", PARAMS_NAME, can_open_meta, lambda directory, _: open_meta(directory)),
)
# What else people have, told apart so that the error can say so.
REFUSED_FILES = {"*.bin": "PyTorch pickles", "*.pt": "PyTorch pickles", "*.pth": "PyTorch pickles", "*.gguf": "GGUF"}


def open_checkpoint(path: str | os.PathLike[str], *, weights: bool = True, progress: Progress = silent) -> Checkpoint:
    """Open and check a checkpoint directory, reading headers only; `synthetic:PRESET` opens one that is made up.

    `NAME?layers=4-7` takes these layers of it, `NAME?layers=4` the first four. `owner/name[@revision]` opens one on the
    Hub and downloads what is needed of it; without `weights` only config and headers, which say all but the values.

    Raises InputError where it is missing, malformed, of another architecture, quantized in a way that is not read, or
    where tensors are unknown, missing, or of the wrong shape or dtype (all of these in one error); EnvironmentProblem
    where it is gated or cannot be reached.
    """
    name, layers = split_part(os.fspath(path))
    whole = _open_whole(Path(name), weights=weights, progress=progress)
    return whole if layers is None else take_layers(whole, layers)


def _open_whole(directory: Path, *, weights: bool, progress: Progress) -> Checkpoint:
    if is_synthetic(directory):
        return _open_synthetic(str(directory))
    hub = None
    if (name := hub_name(directory)) is not None:
        snapshot = fetch(name, weights=weights, progress=progress)
        hub, directory = snapshot.name, snapshot.directory
    _check_directory(directory)
    complaints: Complaints = {}
    if hub is not None and not weights:
        stored_as, headers = FORMATS[0], snapshot.headers()
        config, store = _open_hugging_face(directory, complaints, lambda _: headers)
    else:
        stored_as = _format(directory)
        config, store = stored_as.open(directory, complaints)
    form = detect_form(store.tensors, config)
    names = {name: form.source(name) for name in expected_parameters(config)}
    dropped = {name for name in store.tensors if is_dropped(name)}
    if config.tie_word_embeddings and form.head in store.tensors:
        if not complaints:  # what they are about cannot be read
            _check_tied(store, form.source(EMBEDDING), form.source(HEAD))
        dropped.add(form.head)
    _check_tensors(directory / stored_as.config_name, config, store, names, dropped, complaints)
    return Checkpoint(
        directory=directory,
        config_name=stored_as.config_name,
        hub=hub,
        config=config,
        store=store,
        names=names,
        dropped=tuple(n for n in store.tensors if n in dropped),
    )


def _open_synthetic(name: str) -> Checkpoint:
    preset = parse_synthetic(name)
    store = open_synthetic(preset, name)
    names = {ours: FORM.source(ours) for ours in expected_parameters(preset.model)}
    return Checkpoint(directory=Path(name), config=preset.model, store=store, names=names, dropped=())


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise InputError(f"{directory} does not exist; expected a checkpoint directory with config.json and weights.")
    if not directory.is_dir():
        raise InputError(
            f"{directory} is a file; expected the checkpoint directory that holds config.json and weights."
        )


def _format(directory: Path) -> Format:
    for form in FORMATS:
        if form.can_open(directory):
            return form
    read_config(directory / CONFIG_NAME)  # says first where not even that is there
    others = [f"{kind} ({pattern})" for pattern, kind in REFUSED_FILES.items() if any(directory.glob(pattern))]
    instead = f"it holds {' and '.join(others)}, which corral does not read" if others else "it holds no weights at all"
    raise InputError(
        f"{directory} has no *.safetensors file: {instead}. Download the safetensors version of the model."
    )


def _check_tensors(
    described: Path,
    config: ModelConfig,
    store: TensorStore,
    names: dict[str, str],
    dropped: set[str],
    found_before: Complaints,
) -> None:
    """Every parameter is there, of the right shape and a dtype we read, and nothing else: or one error says it all."""
    shapes = {names[name]: shape for name, shape in expected_parameters(config).items()}
    missing = [name for name in shapes if name not in store.tensors]
    unknown = [name for name in store.tensors if name not in shapes and name not in dropped]
    present = [store.tensors[name] for name in shapes if name in store.tensors]
    wrong_shape = [f"{t.name} {list(t.shape)} not {list(shapes[t.name])}" for t in present if t.shape != shapes[t.name]]
    wrong_dtype = [f"{t.name} {t.dtype}" for t in present if t.dtype not in WEIGHT_DTYPES]
    complaints = {
        "missing": missing,
        "unknown": unknown,
        f"of another shape than {described.name} says": wrong_shape,
        f"of another dtype than {', '.join(WEIGHT_DTYPES)}": wrong_dtype,
    }
    for what, names_ in found_before.items():
        complaints[what] = names_ + complaints.get(what, [])
    found = [f"{len(names)} {what}: {listed(names)}" for what, names in complaints.items() if names]
    if found:
        raise InputError(
            f"{described.parent}: the tensors are not those that {described.name} describes; {'; '.join(found)}. Either the "
            "checkpoint is incomplete or damaged (download it again) or it is not a plain Llama 4."
        )


def _check_tied(store: TensorStore, embedding: str, head: str) -> None:
    """A head stored beside tied embeddings must say the same; which of two different ones is meant cannot be known."""
    a, b = store.tensors.get(embedding), store.tensors[head]
    rows = 4096
    if a is not None and (a.shape, a.dtype) == (b.shape, b.dtype):
        blocks = [(slice(start, start + rows),) for start in range(0, a.shape[0], rows)]
        if all(torch.equal(store.read_slice(embedding, where), store.read_slice(head, where)) for where in blocks):
            return
    raise InputError(
        f"config.json ties the embeddings (tie_word_embeddings), but {head} is stored and differs from {embedding}. "
        "Set tie_word_embeddings to false if the head is meant, or remove that tensor."
    )
