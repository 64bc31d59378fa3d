"""Meta's own checkpoints: `params.json` and tensor-parallel shards `consolidated.00.pth`, …, read by slice.

Each of our parameters is put together of boxes, one or more a shard; a slice copies only what it meets of them. What
lies where is in `meta_names.py`, how a file is opened without running it in `torch_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from corral.model.checkpoint.json_file import read_json
from corral.model.checkpoint.meta_names import IGNORED, Layout, layout_of
from corral.model.checkpoint.names import FORMS, expected_parameters, is_dropped
from corral.model.checkpoint.store import TensorInfo, listed
from corral.model.checkpoint.torch_file import StoredTensor, read_tensors
from corral.spec.errors import InputError
from corral.spec.meta_params import PARAMS_NAME, parse_params
from corral.spec.model_config import ModelConfig

SHARDS = "consolidated*.pth"
SHARD_NAME = re.compile(r"consolidated(?:\.(\d{2}))?\.pth")
# Beside weights that llama-models' scripts/quantize.py has quantized.
SCALES = ("fp8_scales_*.pt", "int4_scales_*.pt")
FORM = FORMS[0]
EMBEDDING, OUTPUT_PROJECTION = "tok_embeddings.weight", "layers.0.attention.wo.weight"


@dataclass(frozen=True)
class Box:
    """A stored block, and where its first number belongs in the joined tensor."""

    stored: StoredTensor
    origin: tuple[int, ...]

    def meet(self, wanted: Sequence[range]) -> tuple[Tensor, tuple[slice, ...]] | None:
        """What the box holds of `wanted`, and where in it that belongs; None where they do not meet."""
        inside, outside = [], []
        for cut, start, size in zip(wanted, self.origin, self.stored.shape, strict=True):
            first, last = max(cut.start, start), min(cut.stop, start + size)
            if first >= last:
                return None
            inside.append(slice(first - start, last - start))
            outside.append(slice(first - cut.start, last - cut.start))
        return self.stored.map()[tuple(inside)], tuple(outside)


@dataclass(frozen=True)
class JoinedTensor:
    """Boxes that fill a tensor; or, as `copies`, boxes that each are the whole tensor."""

    boxes: tuple[Box, ...]
    copies: bool


@dataclass(frozen=True)
class MetaStore:
    """The joined tensors, named as Hugging Face's; those of the image encoder under Meta's names, for the record."""

    tensors: Mapping[str, TensorInfo]
    joined: Mapping[str, JoinedTensor]

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """`tensor[where]`, of each shard only its part. Raises InputError where copies differ between shards."""
        info, joined = self.tensors[name], self.joined[name]
        cuts = (*where, *[slice(None)] * (len(info.shape) - len(where)))
        wanted = [
            range(size)[cut] if isinstance(cut, slice) else range(cut, cut + 1)
            for size, cut in zip(info.shape, cuts, strict=True)
        ]
        met = [found for box in joined.boxes if (found := box.meet(wanted))]
        if joined.copies and met:
            values = met[0][0]
            if not all(_same_bits(values, copy) for copy, _ in met[1:]):
                raise InputError(
                    f"tensor {name} must be the same in every shard, and is not in {info.file} and those beside it: "
                    "they are not of one checkpoint. Download it again."
                )
        elif len(met) == 1:
            values = met[0][0]
        else:
            values = torch.empty([len(cut) for cut in wanted], dtype=getattr(torch, info.dtype))
            for part, place in met:
                values[place] = part
        return values[tuple(0 if isinstance(cut, int) else slice(None) for cut in cuts)]


def can_open_meta(directory: Path) -> bool:
    """Whether the directory holds Meta's shards, and `params.json` or at least no other model's config."""
    described = (directory / PARAMS_NAME).is_file() or not (directory / "config.json").is_file()
    return described and any(directory.glob(SHARDS))


def open_meta(directory: Path) -> tuple[ModelConfig, MetaStore]:
    """Read and check `params.json` and what every shard says of its tensors; no weight is read.

    Raises InputError: a file is missing, damaged, or holds code; shards disagree; the weights are quantized; a shape is
    not that of `params.json`; a tensor is unknown. A missing tensor is the caller's to report.
    """
    if scales := [path.name for pattern in SCALES for path in sorted(directory.glob(pattern))]:
        raise InputError(
            f"{directory} holds quantized weights ({listed(scales)} lies beside them); expected bf16. Give corral the "
            "checkpoint that they were made of."
        )
    if not (directory / PARAMS_NAME).is_file():
        raise InputError(f"{directory} has {SHARDS}, but no {PARAMS_NAME}, which says what they are. Download it, too.")
    shards = [read_tensors(file) for file in _files(directory)]
    _check_alike(directory, shards)
    _check_count(directory, shards)
    raw = read_json(directory / PARAMS_NAME)
    vocabulary = sum(shard[EMBEDDING].shape[0] for shard in shards if len(shard[EMBEDDING].shape) == 2)
    config = parse_params(raw, vocab_size=vocabulary, where=str(directory / PARAMS_NAME))
    if config.num_key_value_heads % len(shards):
        raise InputError(
            f"{directory} has {len(shards)} shards for {config.num_key_value_heads} key/value heads; expected each head "
            "in one shard only."
        )
    shapes = expected_parameters(config)
    parameters = _join(directory, shards, shapes)
    infos = [_info(FORM.source(ours), joined, shapes[ours]) for ours, joined in parameters.items()]
    images = [TensorInfo(n, t.file, t.dtype, t.shape) for n, t in shards[0].items() if is_dropped(n)]
    return config, MetaStore(
        tensors={info.name: info for info in (*infos, *images)},
        joined={FORM.source(ours): joined for ours, joined in parameters.items()},
    )


def _files(directory: Path) -> list[Path]:
    """The shards in order, none missing between them."""
    found = {path.name: path for path in directory.glob(SHARDS)}
    numbers = {match[1]: path for name, path in found.items() if (match := SHARD_NAME.fullmatch(name))}
    expected = [f"{i:02}" for i in range(len(numbers))] if None not in numbers else [None]
    if sorted(numbers, key=str) != expected:
        raise InputError(
            f"{directory} has {listed(sorted(found))}; expected consolidated.00.pth and so on without a gap, or "
            "consolidated.pth alone. Download what is missing."
        )
    return [numbers[number] for number in expected]


def _check_alike(directory: Path, shards: list[dict[str, StoredTensor]]) -> None:
    """Every shard has the same names and dtypes."""
    kinds = [{name: t.dtype for name, t in shard.items() if not IGNORED.fullmatch(name)} for shard in shards]
    for number, kind in enumerate(kinds):
        if different := sorted(name for name in kind.keys() | kinds[0].keys() if kind.get(name) != kinds[0].get(name)):
            raise InputError(
                f"{directory}: consolidated.00.pth and consolidated.{number:02}.pth disagree about {listed(different)} "
                "(there or not, or dtype): they are not of one checkpoint."
            )
    if needed := [name for name in (EMBEDDING, OUTPUT_PROJECTION) if name not in shards[0]]:
        raise InputError(f"{directory}: the shards have no {listed(needed)}; they are not of a Llama 4.")


def _check_count(directory: Path, shards: list[dict[str, StoredTensor]]) -> None:
    """As many shards as one shard's part of the heads says; a missing last one has no other sign."""
    shape = shards[0][OUTPUT_PROJECTION].shape  # [dim, dim / shards]: Meta's heads make up dim
    count = shape[0] / shape[1] if len(shape) == 2 and shape[1] else 0
    if count != len(shards):
        raise InputError(
            f"{directory} has {len(shards)} of {count:g} shards: {OUTPUT_PROJECTION} is {list(shape)} in the first. "
            "Download what is missing."
        )


def _join(
    directory: Path, shards: list[dict[str, StoredTensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, JoinedTensor]:
    """Our parameter -> its boxes, where all of them are there."""
    boxes: dict[str, list[Box]] = {}
    layouts: dict[str, Layout] = {}
    unknown, wrong = [], []
    for name in shards[0]:
        if IGNORED.fullmatch(name) or is_dropped(name):
            continue
        ours, layout = layout_of(name) or ((), None)
        if layout is None or not all(held in shapes for held in ours):
            unknown.append(name)
            continue
        wholes = [shapes[held] for held in ours]
        expected = layout.stored_shape(wholes, len(shards))
        if others := [shard[name].shape for shard in shards if shard[name].shape != expected]:
            wrong.append(f"{name} {list(others[0])} not {list(expected)}")
            continue
        for rank, shard in enumerate(shards):
            parts = layout.split(shard[name], wholes, len(shards))
            for held, whole, part in zip(ours, wholes, parts, strict=True):
                boxes.setdefault(held, []).append(Box(part, layout.origin(whole, rank, len(shards))))
                layouts[held] = layout
    needed = {held: len(shards) * (1 if layout.half is None else 2) for held, layout in layouts.items()}
    complaints = {
        "unknown": unknown,
        "of two dtypes": [held for held, found in boxes.items() if len({box.stored.dtype for box in found}) > 1],
        "stored twice, fused and not": [held for held in boxes if len(boxes[held]) > needed[held]],
        f"of another shape than {PARAMS_NAME} says": wrong,
    }
    if said := [f"{len(names)} {what}: {listed(names)}" for what, names in complaints.items() if names]:
        raise InputError(
            f"{directory}: the tensors are not those that {PARAMS_NAME} describes; {'; '.join(said)}. Either the "
            "checkpoint is incomplete or damaged (download it again) or it is not a plain Llama 4."
        )
    return {
        held: JoinedTensor(tuple(found), copies=layouts[held].joined is None)
        for held, found in boxes.items()
        if len(found) == needed[held]
    }


def _info(name: str, joined: JoinedTensor, shape: tuple[int, ...]) -> TensorInfo:
    first = joined.boxes[0].stored
    files = dict.fromkeys(box.stored.file for box in joined.boxes)
    return TensorInfo(name, first.file, first.dtype, shape, other_files=tuple(files)[1:])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of numbers that are not finite, which `Checkpoint.read` reports better."""
    dense = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(*dense)
