"""The seam between the engine and whatever computes the decoder: one step in, logits out, caches written in place.

Letters: B batch, S new tokens, R rows to compute logits for, H hidden, V vocabulary, G key/value heads, C cache rows,
D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corral.spec.model_config import KvClass

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Cache = NDArray[np.floating[Any]]  # of the type that the manifest's KV class names


@dataclass(frozen=True, eq=False)
class CacheView:
    """The caches of consecutive slots: per layer contiguous arrays [B, G, C, D] that a step writes into.

    The same object means the same memory, so that a session may keep what it bound.
    """

    keys: tuple[Cache, ...]
    values: tuple[Cache, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass through the decoder; the meaning of each field is that of the graph input in `spec.graph_io`."""

    embeddings_BSH: Float32
    positions_BS: Int64
    logit_rows_BR: Int64
    past_length_B: Mapping[KvClass, Int64]
    caches: CacheView


class Session(Protocol):
    """Computes steps, one at a time."""

    def run(self, step: Step) -> Float32:
        """Return logits [B, R, V], the caller's to keep; new keys and values are in `step.caches` afterwards."""

    def release(self) -> None:
        """Let go of the caches of the last step, so that their memory can be freed."""
