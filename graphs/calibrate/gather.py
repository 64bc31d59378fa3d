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
from numpy.typing import NDArray

from corral.graphs.calibrate.input_sums import InputSums, Products
from corral.graphs.calibrate.run_layer import BLOCK_TOKENS
from corral.graphs.calibrate.statistics import Statistics, input_site
from corral.graphs.calibrate.streamed_model import StreamedModel
from corral.graphs.execute.shards import PARTIAL
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import HEAD
from corral.spec.progress import Progress, silent


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
    model = StreamedModel(checkpoint)
    total, layers = ids.size * config.num_layers, range(config.num_layers + 1)
    first = max((i for i in layers if statistics.hidden_path(i).exists()), default=None)
    if first is None:
        with _new_hidden(statistics.hidden_path(0), shape) as hidden:
            model.embed(ids, hidden)
        first = 0

    def save(site: str, expert: int | None, seen: InputSums) -> None:
        statistics.save(statistics.path(site, expert), seen.arrays())

    for i in range(first, config.num_layers):

        def report(share: float, i: int = i) -> None:
            progress("calibrate", round((i + share) * ids.size), total, "tokens")

        report(0)
        path = statistics.hidden_path(i)
        before = np.memmap(path, np.float32, "r", shape=shape)
        between_path = path.with_name(f"{path.name}.between{PARTIAL}")
        between = np.memmap(between_path, np.float32, "w+", shape=shape)
        with _new_hidden(statistics.hidden_path(i + 1), shape) as after:
            model.run_layer(i, before, between, after, save=save, products=products, progress=report)
        del before, between
        between_path.unlink()
        path.unlink()
    _gather_head(model, statistics, shape, products)
    statistics.hidden_path(config.num_layers).unlink()


def _gather_head(model: StreamedModel, statistics: Statistics, shape: tuple[int, ...], products: Products) -> None:
    path = statistics.hidden_path(model.checkpoint.config.num_layers)
    rows = np.memmap(path, np.float32, "r", shape=shape).reshape(-1, shape[-1])
    seen = InputSums(shape[-1], products)
    for start in range(0, len(rows), BLOCK_TOKENS):
        seen.add(model.norm(rows[start : start + BLOCK_TOKENS]))
    statistics.save(statistics.path(input_site(HEAD)), seen.arrays())


@contextmanager
def _new_hidden(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Hidden states to be filled; the file has its name when that is done."""
    partial = path.with_name(path.name + PARTIAL)
    hidden = np.memmap(partial, np.float32, "w+", shape=shape)
    yield hidden
    hidden.flush()
    del hidden
    os.replace(partial, path)
