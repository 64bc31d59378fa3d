"""Open a checkpoint directory: decide its format, and hold every tensor's name, shape and dtype against the config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.hub import fetch, hub_name
from corral.model.checkpoint.json_file import read_json
from corral.model.checkpoint.meta_pth import can_open_meta, open_meta
from corral.model.checkpoint.names import EMBEDDING, HEAD, detect_form, expected_parameters, is_dropped
from corral.model.checkpoint.safetensors import can_open_safetensors, open_safetensors
from corral.model.checkpoint.store import TensorStore, listed
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
    open: Callable[[Path], tuple[ModelConfig, TensorStore]]


def _open_hugging_face(
    directory: Path, open_store: Callable[[Path], TensorStore] = open_safetensors
) -> tuple[ModelConfig, TensorStore]:
    config = read_config(directory / CONFIG_NAME)
    _refuse_quantized(directory / CONFIG_NAME)
    return config, open_store(directory)


CONFIG_NAME = "config.json"
FORMATS = (
    Format("safetensors", CONFIG_NAME, can_open_safetensors, _open_hugging_face),
    Format("Meta's consolidated.*.pth", PARAMS_NAME, can_open_meta, open_meta),
)
# What else people have, told apart so that the error can say so.
REFUSED_FILES = {"*.bin": "PyTorch pickles", "*.pt": "PyTorch pickles", "*.pth": "PyTorch pickles", "*.gguf": "GGUF"}


def open_checkpoint(path: str | os.PathLike[str], *, weights: bool = True, progress: Progress = silent) -> Checkpoint:
    """Open and check a checkpoint directory, reading headers only; `synthetic:PRESET` opens one that is made up.

    `owner/name[@revision]` opens one on the Hub and downloads what is needed of it; without `weights` only config and
    headers, which say all but the values. Raises EnvironmentProblem where it is gated or cannot be reached.

    Raises InputError where it is missing, malformed, quantized, of another architecture, or where tensors are unknown,
    missing, or of the wrong shape or dtype (all of these in one error).
    """
    directory = Path(path)
    if is_synthetic(directory):
        return _open_synthetic(str(directory))
    hub = None
    if (name := hub_name(directory)) is not None:
        snapshot = fetch(name, weights=weights, progress=progress)
        hub, directory = snapshot.name, snapshot.directory
    _check_directory(directory)
    if hub is not None and not weights:
        stored_as, headers = FORMATS[0], snapshot.headers()
        config, store = _open_hugging_face(directory, lambda _: headers)
    else:
        stored_as = _format(directory)
        config, store = stored_as.open(directory)
    form = detect_form(store.tensors, config)
    names = {name: form.source(name) for name in expected_parameters(config)}
    dropped = {name for name in store.tensors if is_dropped(name)}
    if config.tie_word_embeddings and form.head in store.tensors:
        _check_tied(store, form.source(EMBEDDING), form.source(HEAD))
        dropped.add(form.head)
    _check_tensors(directory / stored_as.config_name, config, store, names, dropped)
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
    """A preset, or a range of its layers: they are then numbered from 0, and keep their values."""
    preset, part = parse_synthetic(name)
    store, whole = open_synthetic(preset, name), preset.model
    first, last = part or (0, whole.num_layers - 1)
    config = dataclasses.replace(whole, layers=whole.layers[first : last + 1])
    names = {ours: FORM.source(_shifted(ours, first)) for ours in expected_parameters(config)}
    read = set(names.values())
    return Checkpoint(
        directory=Path(name),
        config=config,
        store=store,
        names=names,
        dropped=tuple(tensor for tensor in store.tensors if tensor not in read),
    )


def _shifted(name: str, first: int) -> str:
    """`layers.0.x` -> `layers.4.x` where layers are counted from 4."""
    layers, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"layers.{int(number) + first}.{rest}" if layers == "layers" else name


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise InputError(f"{directory} does not exist; expected a checkpoint directory with config.json and weights.")
    if not directory.is_dir():
        raise InputError(
            f"{directory} is a file; expected the checkpoint directory that holds config.json and weights."
        )


def _refuse_quantized(path: Path) -> None:
    config = read_json(path)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if quantization := part.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise InputError(
                f"{path} says that the weights are already quantized ({method or str(quantization)[:80]}); expected "
                "bf16, fp16 or fp32 weights. Give corral the original checkpoint."
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
    described: Path, config: ModelConfig, store: TensorStore, names: dict[str, str], dropped: set[str]
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
