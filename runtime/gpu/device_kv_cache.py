"""KV caches on a device: per layer [slots, heads, rows, head dim] of the fixed number of rows that engines are built for.

What `KvCache` is for this process's memory. More slots are more memory, got by doubling; it is kept while idle, because
recorded steps hold its addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral.runtime.gpu.cuda_device import Buffer, Device
from corral.runtime.kv_cache import past_lengths
from corral.runtime.session import CacheView, Int64
from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import KvClass

Address = int


class DeviceKvCache:
    """Caches of up to `max_slots` sequences; `reserve` before use. A layer's cache is named by its address."""

    def __init__(self, device: Device, layouts: Sequence[KvLayout], max_slots: int) -> None:
        self._device, self._layouts, self._max_slots = device, tuple(layouts), max_slots
        self._slot_bytes = slot_bytes(layouts)
        self._slots = 0
        self._keys: list[Buffer] = []
        self._values: list[Buffer] = []
        self._views: dict[tuple[int, int], CacheView[Address]] = {}

    @property
    def num_slots(self) -> int:
        return self._slots

    @property
    def bytes(self) -> int:
        return sum(buffer.bytes for buffer in (*self._keys, *self._values))

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for more sequences; `tokens` are bounded by the rows that there are."""
        if slots <= self._slots:
            return
        slots = max(slots, min(2 * self._slots, self._max_slots))
        self._keys = self._enlarged(self._keys, slots)
        self._values = self._enlarged(self._values, slots)
        self._slots, self._views = slots, {}

    def slot(self, index: int) -> CacheView[Address]:
        return self._view(index, index + 1)

    def prefix(self, count: int) -> CacheView[Address]:
        return self._view(0, count)

    def move(self, source: int, target: int, position: int) -> None:
        for buffer, count in self._buffers():
            self._device.copy(buffer.address + target * count, buffer.address + source * count, count)

    def wipe(self, index: int) -> None:
        for buffer, count in self._buffers():
            self._device.zero(buffer.address + index * count, count)

    def clear(self) -> None:
        """Nothing: rows that no sequence has filled are never looked at, and the memory is kept."""

    def past_lengths(self, positions: Sequence[int]) -> dict[KvClass, Int64]:
        return past_lengths(self._layouts, positions)

    def _buffers(self) -> list[tuple[Buffer, int]]:
        """All of them, each with the bytes of one slot."""
        return list(zip([*self._keys, *self._values], self._slot_bytes * 2, strict=True))

    def _enlarged(self, old: list[Buffer], slots: int) -> list[Buffer]:
        new = [self._device.allocate(slots * count) for count in self._slot_bytes]
        for target, source in zip(new, old, strict=False):
            self._device.copy(target.address, source.address, source.bytes)
        self._device.wait()  # the old ones are freed when this returns
        return new

    def _view(self, start: int, stop: int) -> CacheView[Address]:
        if (start, stop) not in self._views:
            keys, values = (
                tuple(buffer.address + start * count for buffer, count in zip(buffers, self._slot_bytes, strict=True))
                for buffers in (self._keys, self._values)
            )
            self._views[start, stop] = CacheView(keys=keys, values=values)
        return self._views[start, stop]


def slot_bytes(layouts: Sequence[KvLayout]) -> list[int]:
    """Per layer the bytes of one sequence's keys (and as many of its values)."""
    rows = {layer: layout for layout in layouts for layer in layout.layers}
    return [rows[i].bytes(0) // (2 * len(rows[i].layers)) for i in sorted(rows)]
