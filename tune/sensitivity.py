"""What it costs the model's predictions when one part is stored in another way: measured, with all others left as they are.

The reference model in PyTorch runs over a text that calibration has not seen. A part's matrices are replaced by what they
would be read back as, and the layers from there on run again: what comes before does not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from corral.graphs.calibrate.run_layer import Hidden
from corral.graphs.calibrate.statistics import Statistics
from corral.graphs.calibrate.streamed_model import StreamedModel
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import HEAD
from corral.spec.quant_scheme import scheme_named
from corral.spec.weight_plan import Source
from corral.tune.choice import Choice, rounded
from corral.tune.parts import Part

BLOCK_NUMBERS = 1 << 22  # logits that are held at once


class Meter:
    """A checkpoint's predictions for token ids [windows, window], and the divergence from them when parts change.

    Weights are read anew for each measurement. In memory are the head, twice where it changes, the hidden states of the
    text, and what `StreamedModel` holds.
    """

    def __init__(self, checkpoint: Checkpoint, statistics: Statistics, ids: NDArray[np.int64]) -> None:
        self.checkpoint, self.statistics, self._ids = checkpoint, statistics, ids
        self._model = StreamedModel(checkpoint)
        self._layers = checkpoint.config.num_layers
        self._head = self._model.head()
        self._embedded = self._embed(self._model)
        self._reached = 0, self._embedded  # a layer, and what it reads
        self._final = self._model.norm(_rows(self._model.run_layers(self._embedded, 0, self._layers)))

    def divergence(self, chosen: Mapping[Part, Choice]) -> float:
        """Mean KL(model ‖ model with these parts stored so), in nats a token."""
        choices = {
            name: choice
            for part, choice in chosen.items()
            for name in part.parameters
            if scheme_named(choice.weights).is_quantized
        }
        if not choices:
            return 0.0

        def change(name: str, source: Source, values: NDArray[np.float32]) -> NDArray[np.float32]:
            return rounded(values, choices[name], self.statistics, source) if name in choices else values

        model = StreamedModel(self.checkpoint, change)
        first = max(min(part.layer for part in chosen), 0)
        before = self._embed(model) if any(part.is_table for part in chosen) else self._before(first)
        final = model.norm(_rows(model.run_layers(before, first, self._layers)))
        return self._kl(final, model.head() if HEAD in choices else self._head)

    def _embed(self, model: StreamedModel) -> Hidden:
        hidden = np.empty((*self._ids.shape, self.checkpoint.config.hidden_size), np.float32)
        model.embed(self._ids, hidden)
        return hidden

    def _before(self, layer: int) -> Hidden:
        """What a layer reads. Kept for the next call, which is for the same layer or one behind it if calls are in order."""
        reached, hidden = self._reached if self._reached[0] <= layer else (0, self._embedded)
        self._reached = layer, self._model.run_layers(hidden, reached, layer)
        return self._reached[1]

    @torch.no_grad()
    def _kl(self, final: Tensor, head: Tensor) -> float:
        total, size = 0.0, max(1, BLOCK_NUMBERS // len(self._head))
        for start in range(0, len(final), size):
            block = slice(start, start + size)
            reference, other = self._final[block] @ self._head.T, final[block] @ head.T
            # As in `validate/divergence.py`, in float64, too: what is looked for is as small as float32's rounding.
            log_p, log_q = (F.log_softmax(logits.double(), dim=-1) for logits in (reference, other))
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        return max(total / len(final), 0.0)


def _rows(hidden: Hidden) -> Hidden:
    return hidden.reshape(-1, hidden.shape[-1])
