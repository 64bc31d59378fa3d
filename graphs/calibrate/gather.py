"""Run a calibration text through a checkpoint, one layer in memory at a time, and leave statistics files.

The hidden states before a layer are a file, which is there only when everything before that layer is finished: a run that
was killed goes on from the last such file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.exporter.bind_weights import parameter_entry
from corral.graphs.calibrate.input_sums import InputSums, Products
from corral.graphs.calibrate.run_layer import BLOCK_TOKENS, run_layer
from corral.graphs.calibrate.statistics import Statistics, input_site
from corral.graphs.execute.shards import PARTIAL
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.model.text import DecoderLayer, Llama4Text
from corral.spec.progress import Progress, silent
from corral.spec.weight_plan import Source

EMBEDDING_ROWS = 1 << 13  # read at once


@torch.no_grad()
def gather(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    statistics: Statistics,
    *,
    products: Products,
    progress: Progress = silent,
) -> None:
    """Leave the sums of every matrix's inputs over token ids [windows, window] in `statistics`; goes on where it stopped.

    `products`: what is kept of X^T X; all of it takes 4 bytes times the square of a matrix's inputs on disk, for each expert.
    """
    if statistics.path(input_site(HEAD)).exists():
        return
    config = checkpoint.config
    shape = (*ids.shape, config.hidden_size)
    with torch.device("meta"):
        model = Llama4Text(config).eval()
    total, layers = ids.size * config.num_layers, range(config.num_layers + 1)
    first = max((i for i in layers if statistics.hidden_path(i).exists()), default=None)
    if first is None:
        with _new_hidden(statistics.hidden_path(0), shape) as hidden:
            _embed(checkpoint, ids, hidden)
        first = 0

    def save(site: str, expert: int | None, seen: InputSums) -> None:
        statistics.save(statistics.path(site, expert), seen.arrays())

    for i in range(first, config.num_layers):

        def report(share: float, i: int = i) -> None:
            progress("calibrate", round((i + share) * ids.size), total, "tokens")

        report(0)
        layer = model.layers[i]
        assert isinstance(layer, DecoderLayer)
        layer.load_state_dict(_weights(checkpoint, f"layers.{i}."), strict=False, assign=True)
        path = statistics.hidden_path(i)
        before = np.memmap(path, np.float32, "r", shape=shape)
        between_path = path.with_name(f"{path.name}.between{PARTIAL}")
        between = np.memmap(between_path, np.float32, "w+", shape=shape)
        with _new_hidden(statistics.hidden_path(i + 1), shape) as after:
            run_layer(layer, f"layers.{i}", model.rotary, before, between, after,
                      read_expert=lambda name, expert: _read_expert(checkpoint, name, expert),
                      save=save, products=products, progress=report)  # fmt: skip
        del before, between
        between_path.unlink()
        path.unlink()
        layer.to("meta")
    _gather_head(checkpoint, model, statistics, shape, products)
    statistics.hidden_path(config.num_layers).unlink()


def _gather_head(
    checkpoint: Checkpoint, model: Llama4Text, statistics: Statistics, shape: tuple[int, ...], products: Products
) -> None:
    model.norm.load_state_dict(_weights(checkpoint, "norm."), assign=True)
    hidden = np.memmap(statistics.hidden_path(len(model.layers)), np.float32, "r", shape=shape)
    seen = InputSums(shape[-1], products)
    rows = hidden.reshape(-1, shape[-1])
    for start in range(0, len(rows), BLOCK_TOKENS):
        seen.add(model.norm(torch.from_numpy(rows[start : start + BLOCK_TOKENS].copy())))
    statistics.save(statistics.path(input_site(HEAD)), seen.arrays())


def _embed(checkpoint: Checkpoint, ids: NDArray[np.int64], hidden: NDArray[np.float32]) -> None:
    """Rows of the embedding table, which is read in blocks and never whole."""
    tensor, (rows, columns) = checkpoint.source(EMBEDDING), checkpoint.info(EMBEDDING).shape
    for start in range(0, rows, EMBEDDING_ROWS):
        stop = min(start + EMBEDDING_ROWS, rows)
        wanted = (ids >= start) & (ids < stop)
        if wanted.any():
            hidden[wanted] = checkpoint.read(Source(tensor, (start, stop), (0, columns)))[ids[wanted] - start]


def _weights(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Parameters under `prefix`, in float32 and without it; the fused experts are left out."""
    return {
        name.removeprefix(prefix): torch.from_numpy(checkpoint.read(pieces_of(checkpoint, name)[0]))
        for name in checkpoint.names
        if name.startswith(prefix) and ".experts." not in name
    }


def _read_expert(checkpoint: Checkpoint, name: str, expert: int) -> Tensor:
    return torch.from_numpy(checkpoint.read(pieces_of(checkpoint, name)[expert]))


def pieces_of(checkpoint: Checkpoint, name: str) -> tuple[Source, ...]:
    """The slices that hold a parameter, each as the matrix [outputs, inputs]: those that the plan reads."""
    return parameter_entry(name, checkpoint.info(name)).pieces


@contextmanager
def _new_hidden(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Hidden states to be filled; the file has its name when that is done."""
    partial = path.with_name(path.name + PARTIAL)
    hidden = np.memmap(partial, np.float32, "w+", shape=shape)
    yield hidden
    hidden.flush()
    del hidden
    os.replace(partial, path)
