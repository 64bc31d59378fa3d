"""A checkpoint of any size as what builds are held against: in float32, of which a layer and the head are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from corral.graphs.calibrate.streamed_model import StreamedModel
from corral.model.checkpoint.checkpoint import Checkpoint

ROWS = 64  # of logits at once


class StreamedReference:
    """Logits of the windows that it is made for, all of one length."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        self.config = checkpoint.config
        model, ids = StreamedModel(checkpoint), np.asarray(windows)
        hidden = np.empty((*ids.shape, self.config.hidden_size), np.float32)
        model.embed(ids, hidden)
        behind = model.run_layers(hidden, 0, self.config.num_layers)
        self._final = {tuple(window): model.norm(rows) for window, rows in zip(windows, behind, strict=True)}
        self._head = model.head()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """[tokens, vocab] in blocks. Raises KeyError for tokens that are none of the windows."""
        for rows in self._final[tuple(token_ids)].split(ROWS):
            yield (rows @ self._head.T).numpy()
