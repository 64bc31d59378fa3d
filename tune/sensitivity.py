"""What it costs the model's predictions when one part is stored in another way: measured, with all others left as they are.

The reference model in PyTorch runs over a text that calibration has not seen. A part's matrices are replaced by what they
would be read back as, and the layers from there on run again: what comes before does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from corral.graphs.calibrate.gather import pieces_of
from corral.graphs.calibrate.statistics import Statistics
from corral.model.checkpoint import load_reference
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.quant_scheme import scheme_named
from corral.tune.choice import Choice, rounded
from corral.tune.parts import Part

BLOCK_NUMBERS = 1 << 22  # logits that are held at once


class Meter:
    """The model, its predictions for token ids [windows, window], and the divergence from them when parts change.

    Needs the model in float32 in memory, and the hidden states of the text.
    """

    def __init__(self, checkpoint: Checkpoint, statistics: Statistics, ids: NDArray[np.int64]) -> None:
        self.checkpoint, self.statistics = checkpoint, statistics
        self._model = load_reference(checkpoint)
        self._head = self._model.lm_head.weight.data  # the numbers, not the parameter that is given others
        if checkpoint.config.tie_word_embeddings:  # the head is rounded, the table is not
            self._model.lm_head.weight = torch.nn.Parameter(self._head.clone(), requires_grad=False)
        ids_BS = torch.from_numpy(ids)
        self._positions = torch.arange(ids.shape[1]).expand_as(ids_BS)
        with torch.no_grad():
            self._embedded = self._model.embed_tokens(ids_BS)
        self._reached = 0, self._embedded  # a layer, and what it reads
        self._final = self._run(self._embedded, 0)

    @torch.no_grad()
    def divergence(self, chosen: Mapping[Part, Choice]) -> float:
        """Mean KL(model ‖ model with these parts stored so), in nats a token."""
        if not any(scheme_named(choice.weights).is_quantized for choice in chosen.values()):
            return 0.0
        first = min(part.layer for part in chosen)
        before = self._before(first)
        with self._replaced(chosen):
            return self._kl(self._run(before, first))

    def _before(self, layer: int) -> Tensor:
        """What a layer reads. Kept for the next call, which is for the same layer or one behind it if calls are in order."""
        reached, x = self._reached if self._reached[0] <= layer else (0, self._embedded)
        rotary = self._model.rotary(self._positions)
        for i in range(reached, layer):
            x = self._model.layers[i](x, rotary, self._positions, None, None, None)[0]
        self._reached = layer, x
        return x

    @torch.no_grad()
    def _run(self, x: Tensor, first: int) -> Tensor:
        """Hidden states [tokens, H] that the head reads."""
        rotary = self._model.rotary(self._positions)
        for i in range(first, len(self._model.layers)):
            x = self._model.layers[i](x, rotary, self._positions, None, None, None)[0]
        return self._model.norm(x).flatten(0, 1)

    def _kl(self, final: Tensor) -> float:
        total, size = 0.0, max(1, BLOCK_NUMBERS // len(self._head))
        for start in range(0, len(final), size):
            block = slice(start, start + size)
            reference, other = self._final[block] @ self._head.T, final[block] @ self._model.lm_head.weight.T
            # As in `validate/divergence.py`, in float64, too: what is looked for is as small as float32's rounding.
            log_p, log_q = (F.log_softmax(logits.double(), dim=-1) for logits in (reference, other))
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        return max(total / len(final), 0.0)

    @contextmanager
    def _replaced(self, chosen: Mapping[Part, Choice]) -> Iterator[None]:
        kept = {}
        for part, choice in chosen.items():
            for name in part.parameters:
                parameter = self._model.get_parameter(name)
                kept[name] = parameter.data
                parameter.data = self._rounded(name, parameter.data, choice)
        try:
            yield
        finally:
            for name, data in kept.items():
                self._model.get_parameter(name).data = data

    def _rounded(self, name: str, values: Tensor, choice: Choice) -> Tensor:
        """The parameter, in its own shape: [outputs, inputs], or of experts [experts, inputs, outputs]."""
        sources = pieces_of(self.checkpoint, name)
        if values.dim() == 2:
            return torch.from_numpy(rounded(values.numpy(), choice, self.statistics, sources[0]))
        return torch.stack(
            [
                torch.from_numpy(rounded(np.ascontiguousarray(matrix.T.numpy()), choice, self.statistics, source)).T
                for matrix, source in zip(values, sources, strict=True)
            ]
        )
