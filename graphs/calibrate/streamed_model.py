"""A checkpoint's decoder in float32 that reads each weight when it is needed: in memory are a layer without its experts, and
one expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.exporter.bind_weights import parameter_entry
from corral.graphs.calibrate.input_sums import InputSums, Products
from corral.graphs.calibrate.run_layer import Hidden, Save, run_layer
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.model.text import DecoderLayer, Llama4Text
from corral.spec.weight_plan import JOB_ELEMENTS, Source

# A parameter, where a piece of it lies, and what was read there -> the values to compute with.
Change = Callable[[str, Source, NDArray[np.float32]], NDArray[np.float32]]


def _as_it_is(name: str, source: Source, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values


def _drop(site: str, expert: int | None, sums: InputSums) -> None:
    """Nobody wants to know what was summed."""


class StreamedModel:
    """The layers of a checkpoint, one at a time. `change` sees each matrix as it is read, of large tables some rows."""

    def __init__(self, checkpoint: Checkpoint, change: Change = _as_it_is) -> None:
        self.checkpoint, self._change = checkpoint, change
        with torch.device("meta"):
            self._model = Llama4Text(checkpoint.config).eval()

    def embed(self, ids: NDArray[np.int64], hidden: Hidden) -> None:
        """Fill hidden states [windows, window, H] with rows of the embedding table, which is read in blocks."""
        for source in self._row_blocks(EMBEDDING):
            start, stop = source.rows
            wanted = (ids >= start) & (ids < stop)
            if wanted.any():
                hidden[wanted] = self._read(EMBEDDING, source)[ids[wanted] - start]

    @torch.no_grad()
    def run_layer(
        self,
        i: int,
        before: Hidden,
        between: Hidden,
        after: Hidden,
        *,
        save: Save = _drop,
        products: Products = "none",
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Layer `i`; see `run_layer` of the module of that name."""
        layer, name = self._model.layers[i], f"layers.{i}"
        assert isinstance(layer, DecoderLayer)
        layer.load_state_dict(self._tensors(f"{name}."), strict=False, assign=True)
        run_layer(layer, name, self._model.rotary, before, between, after,
                  read_expert=self._matrix, save=save, products=products, progress=progress)  # fmt: skip
        layer.to("meta")

    def run_layers(self, hidden: Hidden, first: int, stop: int) -> Hidden:
        """Hidden states [windows, window, H] behind layers `first` to `stop` - 1, of what layer `first` reads."""
        between = np.empty_like(hidden)
        for i in range(first, stop):
            after = np.empty_like(hidden)
            self.run_layer(i, hidden, between, after)
            hidden = after
        return hidden

    @torch.no_grad()
    def norm(self, rows: NDArray[np.float32]) -> Tensor:
        """What the head reads of hidden states [tokens, H] behind the last layer."""
        self._model.norm.load_state_dict(self._tensors("norm."), assign=True)
        return self._model.norm(torch.from_numpy(rows.copy()))

    def head(self) -> Tensor:
        """The head [vocabulary, H], whole."""
        head = torch.empty(self.checkpoint.info(HEAD).shape)
        for source in self._row_blocks(HEAD):
            head[slice(*source.rows)] = torch.from_numpy(self._read(HEAD, source))
        return head

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """Parameters under `prefix` and without it; the fused experts are left out."""
        return {
            name.removeprefix(prefix): self._matrix(name, 0)
            for name in self.checkpoint.names
            if name.startswith(prefix) and ".experts." not in name
        }

    def _matrix(self, name: str, piece: int) -> Tensor:
        return torch.from_numpy(self._read(name, pieces_of(self.checkpoint, name)[piece]))

    def _row_blocks(self, name: str) -> Iterator[Source]:
        """A matrix that is too large to be worked on whole, some rows at a time."""
        [whole] = pieces_of(self.checkpoint, name)
        rows, columns = whole.shape
        size = max(1, JOB_ELEMENTS // columns)
        return (dataclasses.replace(whole, rows=(i, min(i + size, rows))) for i in range(0, rows, size))

    def _read(self, name: str, source: Source) -> NDArray[np.float32]:
        return self._change(name, source, self.checkpoint.read(source))


def pieces_of(checkpoint: Checkpoint, name: str) -> tuple[Source, ...]:
    """The slices that hold a parameter, each as the matrix [outputs, inputs]: those that the plan reads."""
    return parameter_entry(name, checkpoint.info(name)).pieces
