"""The seam between the engine and whatever computes the decoder: one step in, logits out, caches written in place.

Caches belong to the session: they lie where it computes, in this process's memory or on a device.

Letters: B batch, S new tokens, R rows to compute logits for, H hidden, V vocabulary, G key/value heads, C cache rows,
D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import KvClass

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Cache = NDArray[np.floating[Any] | np.uint8]  # of the type that the manifest's KV class names; bytes where quantized


Rows = TypeVar("Rows", covariant=True)  # how a session names one layer's cache: an array, or an address on its device


@dataclass(frozen=True, eq=False)
class CacheView(Generic[Rows]):
    """The caches of consecutive slots: per layer contiguous memory [B, G, C, D] that a step writes into.

    The same object means the same memory, so that a session may keep what it bound.
    """

    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]


class Caches(Protocol):
    """The caches of all slots. A slot is one sequence's place; running sequences occupy slots 0 … n-1."""

    @property
    def num_slots(self) -> int: ...

    @property
    def bytes(self) -> int:
        """Memory taken."""

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for `slots` sequences of up to `tokens` tokens each; what is stored stays."""

    def slot(self, index: int) -> CacheView[Any]:
        """The caches of one sequence, as a batch of one."""

    def prefix(self, count: int) -> CacheView[Any]:
        """The caches of the first `count` slots."""

    def move(self, source: int, target: int, position: int) -> None:
        """Copy the `position` tokens of one slot to another."""

    def wipe(self, index: int) -> None:
        """Make every row of a slot finite again."""

    def clear(self) -> None:
        """Forget every sequence."""

    def past_lengths(self, positions: Sequence[int]) -> Mapping[KvClass, Int64]:
        """Rows filled per KV class, for sequences that hold `positions` tokens."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass through the decoder; the meaning of each field is that of the graph input in `spec.graph_io`."""

    embeddings_BSH: Float32
    positions_BS: Int64
    logit_rows_BR: Int64
    past_length_B: Mapping[KvClass, Int64]
    caches: CacheView[Any]  # of this session's `new_caches`


class Session(Protocol):
    """Computes steps, one at a time."""

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> Caches:
        """Caches for sequences of up to `max_context` tokens, empty."""

    def run(self, step: Step) -> Float32:
        """Return logits [B, R, V]; new keys and values are in `step.caches` afterwards.

        Where R is 1, the next run may overwrite what this one returned; otherwise it is the caller's to keep.
        """

    def release(self) -> None:
        """Let go of the caches of the last step, so that their memory can be freed."""
