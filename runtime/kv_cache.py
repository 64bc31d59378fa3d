"""KV caches in this process's memory: per layer [slots, heads, rows, row items], grown by doubling, shrunk when idle.

A slot is one sequence's place. Running sequences occupy slots 0 … n-1, so that a batch is a prefix of each array:
contiguous, and bound to the graph without a copy. When a sequence leaves, the last one moves into the hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from corral.runtime.session import Cache, CacheView, Int64
from corral.spec.errors import EnvironmentProblem
from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import KvClass

FIRST_ROWS = 256


def past_lengths(layouts: Sequence[KvLayout], positions: Sequence[int]) -> dict[KvClass, Int64]:
    """Rows filled per KV class, [B] each, of sequences that hold `positions` tokens."""
    return {layout.kv_class: np.array([layout.filled_rows(p) for p in positions], dtype=np.int64) for layout in layouts}


class KvCache:
    """Caches for up to `max_context` tokens per slot; `reserve` before use."""

    def __init__(self, layouts: Sequence[KvLayout], max_context: int) -> None:
        self._layouts = tuple(layouts)
        self._max_context = max_context
        self._layout_of = {layer: layout for layout in layouts for layer in layout.layers}
        self._rows: dict[KvClass, int] = {}
        self.clear()

    @property
    def num_slots(self) -> int:
        return self._slots

    @property
    def bytes(self) -> int:
        """Address space taken; the system commits pages only as rows are written."""
        return sum(array.nbytes for array in (*self._keys, *self._values))

    def capacity(self, kv_class: KvClass) -> int:
        return self._rows[kv_class]

    def clear(self) -> None:
        """Forget every sequence and free the memory."""
        self._slots = 0
        self._rows = {layout.kv_class: 0 for layout in self._layouts}
        self._keys: list[Cache] = []
        self._values: list[Cache] = []
        self._views: dict[tuple[int, int], CacheView[Cache]] = {}

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for `slots` sequences of up to `tokens` tokens each; what is stored stays."""
        rows = {layout.kv_class: self._grown(layout, tokens) for layout in self._layouts}
        if slots <= self._slots and rows == self._rows:
            return
        slots = self._slots if slots <= self._slots else max(slots, 2 * self._slots if self._slots else slots)
        try:
            keys = self._enlarge(self._keys, slots, rows)
            values = self._enlarge(self._values, slots, rows)
        except MemoryError:
            wanted = sum(layout.bytes(tokens) for layout in self._layouts) * slots
            raise EnvironmentProblem(
                f"no memory for the KV cache of {slots} sequences of {tokens} tokens ({wanted / 1e9:.1f} GB). "
                "Use shorter prompts, fewer of them at a time (max_batch), or a smaller max_context."
            ) from None
        self._slots, self._rows, self._keys, self._values, self._views = slots, rows, keys, values, {}

    def slot(self, index: int) -> CacheView[Cache]:
        """The caches of one sequence, as a batch of one."""
        return self._view(index, index + 1)

    def prefix(self, count: int) -> CacheView[Cache]:
        """The caches of the first `count` slots."""
        return self._view(0, count)

    def move(self, source: int, target: int, position: int) -> None:
        """Copy the `position` tokens of one slot to another."""
        if position == 0:
            return
        for layer, arrays in enumerate(zip(self._keys, self._values, strict=True)):
            chunk = self._layout_of[layer].chunk
            # At a chunk boundary no row counts as filled, yet nothing is lost: the next token starts the chunk anew.
            rows = position % chunk if chunk else position
            for array in arrays:
                array[target, :, :rows] = array[source, :, :rows]

    def rows(self, index: int, kv_class: KvClass, start: int, stop: int) -> tuple[Cache, ...]:
        """Rows [start, stop) of a slot as they lie here: keys and values [heads, rows, …] of each layer of a class."""
        return tuple(array[index, :, start:stop] for array in self._arrays(kv_class))

    def write_rows(self, index: int, kv_class: KvClass, start: int, rows: Sequence[Cache]) -> None:
        """Copy what `rows` gave into a slot, from row `start` on."""
        for array, new in zip(self._arrays(kv_class), rows, strict=True):
            array[index, :, start : start + new.shape[1]] = new

    def wipe(self, index: int) -> None:
        """Make every row of a slot finite again."""
        for array in (*self._keys, *self._values):
            array[index : index + 1] = 0

    def past_lengths(self, positions: Sequence[int]) -> dict[KvClass, Int64]:
        return past_lengths(self._layouts, positions)

    def _arrays(self, kv_class: KvClass) -> Iterator[Cache]:
        for layer in sorted(self._layout_of):
            if self._layout_of[layer].kv_class == kv_class:
                yield from (self._keys[layer], self._values[layer])

    def _grown(self, layout: KvLayout, tokens: int) -> int:
        now, needed = self._rows[layout.kv_class], layout.capacity(tokens)
        if needed <= now:
            return now
        return min(max(needed, 2 * now, FIRST_ROWS), layout.capacity(self._max_context))

    def _enlarge(self, arrays: list[Cache], slots: int, rows: dict[KvClass, int]) -> list[Cache]:
        grown = []
        for layer in range(len(self._layout_of)):
            layout = self._layout_of[layer]
            shape = (slots, layout.num_heads, rows[layout.kv_class], layout.row_items)
            if arrays and arrays[layer].shape == shape:
                grown.append(arrays[layer])
                continue
            # Zeros, because rows past the filled ones must be finite; the system hands them out lazily.
            array: Cache = np.zeros(shape, dtype=layout.array_dtype)
            if arrays:
                old = arrays[layer]
                array[: old.shape[0], :, : old.shape[2]] = old
            grown.append(array)
        return grown

    def _view(self, start: int, stop: int) -> CacheView[Cache]:
        if (start, stop) not in self._views:
            self._views[start, stop] = CacheView(
                keys=tuple(array[start:stop] for array in self._keys),
                values=tuple(array[start:stop] for array in self._values),
            )
        return self._views[start, stop]
