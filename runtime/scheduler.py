"""Who computes next: prompts first, one at a time in bounded pieces; then all running sequences decode together.

Plain Python over requests: it knows neither arrays nor graphs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from corral.runtime.request import Request
from corral.spec.kv_layout import split_at_chunks


@dataclass(frozen=True)
class Prefill:
    """Read `count` prompt tokens of the request in `slot`, from its position on."""

    request: Request
    slot: int
    count: int


@dataclass(frozen=True)
class Decode:
    """One more token for each request; request i is in slot i."""

    requests: tuple[Request, ...]


class Scheduler:
    """At most `max_batch` requests run, in slots 0 … n-1; the others wait in line."""

    def __init__(self, *, max_batch: int, chunk: int | None, prefill_tokens: int) -> None:
        self._max_batch, self._chunk, self._prefill_tokens = max_batch, chunk, prefill_tokens
        self._waiting: deque[Request] = deque()
        self.running: list[Request] = []  # index = slot

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def schedule(self) -> Prefill | Decode | None:
        """The next piece of work; None where there is none."""
        while self._waiting and len(self.running) < self._max_batch:
            self.running.append(self._waiting.popleft())
        for slot, request in enumerate(self.running):
            if not request.prefilled:
                wanted = min(request.num_prefill, self._prefill_tokens)
                return Prefill(request, slot, split_at_chunks(request.position, wanted, self._chunk)[0][1])
        return Decode(tuple(self.running)) if self.running else None

    def remove(self, request: Request) -> tuple[int, int] | None:
        """Take a request out. Returns (source, target) where the last slot must move into the hole, else None."""
        if request in self._waiting:
            self._waiting.remove(request)
            return None
        if request not in self.running:
            return None
        hole, last = self.running.index(request), len(self.running) - 1
        self.running[hole] = self.running[last]
        self.running.pop()
        return (last, hole) if hole != last else None
