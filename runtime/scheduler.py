"""Who computes next: in rounds of a bounded number of tokens, so that a long prompt does not hold up who is writing.

A round is one token for each sequence that writes, then prompt tokens with what the budget leaves. Prompts are read one
at a time and in order of arrival; when one is read its request writes, and the next may join in the same round.

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
    """At least one more token for each request; request i is in slot i."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Move:
    """The request that was in slot `source` is in slot `target` now."""

    source: int
    target: int


class Scheduler:
    """At most `max_batch` requests run, in slots 0 … n-1; at most `max_waiting` others wait in line.

    Those that write come first, so that they are a prefix of the slots; the one whose prompt is being read is the last.
    """

    def __init__(self, *, max_batch: int, max_waiting: int, chunk: int | None, step_tokens: int) -> None:
        self._max_batch, self._max_waiting, self._chunk = max_batch, max_waiting, chunk
        self._step_tokens = step_tokens
        self._left = step_tokens  # prompt tokens that this round may still read
        self._waiting: deque[Request] = deque()
        self.running: list[Request] = []  # index = slot

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, request: Request) -> bool:
        """Put a request in line; False where the line is full."""
        if len(self._waiting) >= self._max_waiting:
            return False
        self._waiting.append(request)
        return True

    def admit(self) -> tuple[Request, int] | None:
        """Let the next request in, if nobody's prompt is being read and there is a slot: the request and its slot."""
        reading = bool(self.running) and not self.running[-1].prefilled
        if reading or not self._waiting or len(self.running) == self._max_batch:
            return None
        self.running.append(self._waiting.popleft())
        return self.running[-1], len(self.running) - 1

    def schedule(self) -> Prefill | Decode | None:
        """The next piece of work among those that were let in; None where there is none."""
        if not self.running:
            return None
        last = self.running[-1]
        writing = self.running if last.prefilled else self.running[:-1]
        if not writing:  # nobody to hold up
            self._left = self._step_tokens
        if not last.prefilled and self._left > 0:
            count = split_at_chunks(last.position, min(last.num_prefill, self._left), self._chunk)[0][1]
            self._left -= count
            return Prefill(last, len(self.running) - 1, count)
        # Whoever reads is not starved by many who write: one token at least.
        self._left = max(self._step_tokens - len(writing), 1)
        return Decode(tuple(writing))

    def remove(self, request: Request) -> list[Move]:
        """Take a request out, running or waiting. Returns the moves, in order, that close the hole it leaves."""
        if request in self._waiting:
            self._waiting.remove(request)
            return []
        if request not in self.running:
            return []
        hole, moves = self.running.index(request), []
        reading = not self.running[-1].prefilled
        # The last one that writes, and then the one that reads, who must stay behind those that write.
        for source in range(len(self.running) - (2 if reading else 1), len(self.running)):
            if source > hole:
                self.running[hole] = self.running[source]
                moves.append(Move(source, hole))
                hole = source
        self.running.pop()
        return moves
