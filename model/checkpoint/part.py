"""A range of a checkpoint's layers as a checkpoint: `NAME?layers=4-7`, for trying things out on a model too large."""

from __future__ import annotations

import dataclasses
import re

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import expected_parameters
from corral.spec.errors import InputError

SPELLING = re.compile(r"(?P<name>.*)\?layers=(?P<layers>[^?]*)", re.S)
LAYERS = re.compile(r"(?P<first>\d{1,4})(-(?P<last>\d{1,4}))?")


def split_part(name: str) -> tuple[str, str | None]:
    """`scout?layers=4-7` -> the checkpoint's own name, and which layers; None where it is not a part."""
    match = SPELLING.fullmatch(name)
    return (match["name"], match["layers"]) if match else (name, None)


def take_layers(whole: Checkpoint, layers: str) -> Checkpoint:
    """The layers `4-7` of a checkpoint, or its first `4`: they are then numbered from 0. Embedding and head stay.

    Raises InputError for layers that it does not have.
    """
    match, count = LAYERS.fullmatch(layers), whole.config.num_layers
    first, last = -1, -1
    if match:
        first, last = (
            (0, int(match["first"]) - 1) if match["last"] is None else (int(match["first"]), int(match["last"]))
        )
    if not 0 <= first <= last < count:
        raise InputError(
            f'{whole.directory} has {count} layers, 0 to {count - 1}; layers "{layers[:40]}" was asked for, expected a count '
            "of them or FIRST-LAST."
        )
    config = dataclasses.replace(whole.config, layers=whole.config.layers[first : last + 1])
    names = {ours: whole.names[_shifted(ours, first)] for ours in expected_parameters(config)}
    read = set(names.values())
    return dataclasses.replace(
        whole,
        part=f"?layers={layers}",
        config=config,
        names=names,
        dropped=tuple(tensor for tensor in whole.tensors if tensor not in read),
    )


def _shifted(name: str, first: int) -> str:
    """`layers.0.x` -> `layers.4.x` where layers are counted from 4."""
    layers, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"layers.{int(number) + first}.{rest}" if layers == "layers" else name
