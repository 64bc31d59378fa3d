"""schedule -> run -> postprocess: moves every request one step on; several callers may share it.

A request's result does not depend on its neighbours: each has its own slot, position, generator and text. Whoever waits
for a request steps the engine, so requests of several callers (a stream and a batch, threads) advance together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from corral.runtime.request import Request
from corral.runtime.scheduler import Decode, Prefill, Scheduler
from corral.runtime.session import Caches, CacheView, Float32, Session, Step
from corral.spec.errors import Overloaded
from corral.spec.kv_layout import KvLayout, split_at_chunks

# Tokens of a round: enough to fill the matrix units, little enough for activations to stay small and others not to wait.
STEP_TOKENS = 512
# Requests in line: each is only its prompt's ids, but who asks that much should be told to come back later.
MAX_WAITING = 1024
# Most logits computed at a time while scoring (256 MiB of float32).
SCORE_LOGITS = 64 << 20


class Engine:
    """Runs requests over one session and one set of caches."""

    def __init__(
        self,
        session: Session,
        embed: Callable[[Sequence[int]], Float32],
        layouts: Sequence[KvLayout],
        *,
        vocab_size: int,
        max_context: int,
        max_batch: int = 16,
        max_waiting: int = MAX_WAITING,
        step_tokens: int = STEP_TOKENS,
    ) -> None:
        self._session, self._embed, self._layouts = session, embed, tuple(layouts)
        self._max_context, self._max_waiting = max_context, max_waiting
        self._chunk = next((layout.chunk for layout in layouts if layout.chunk), None)
        self._score_tokens = max(1, min(step_tokens, SCORE_LOGITS // vocab_size))
        self._cache = session.new_caches(layouts, max_context)
        self._scheduler = Scheduler(
            max_batch=max_batch, max_waiting=max_waiting, chunk=self._chunk, step_tokens=step_tokens
        )
        self._lock = threading.RLock()

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    def offer(self, request: Request) -> bool:
        """Take a request in; False where as many wait as may."""
        with self._lock:
            return self._scheduler.add(request)

    def add(self, request: Request) -> None:
        """Take a request in. Raises Overloaded where as many wait as may."""
        if not self.offer(request):
            raise Overloaded(
                f"{self._max_waiting} requests are waiting already, which is as many as may. Try again when some are done, "
                "or open the LLM with a larger max_waiting."
            )

    def cancel(self, request: Request) -> None:
        """Take a request out, finished or not; no harm where it is gone already."""
        with self._lock:
            if request.error is not None and request in self._scheduler.running:
                # Its rows may hold NaN, which a later tenant's masked attention would turn into NaN again.
                self._cache.wipe(self._scheduler.running.index(request))
            for move in self._scheduler.remove(request):
                self._cache.move(move.source, move.target, self._scheduler.running[move.target].position)
            if self.idle and self._cache.num_slots:
                # Frees memory, and spares backends that look at a cache's whole capacity.
                self._cache.clear()
                self._session.release()

    def step(self) -> None:
        """Do one piece of work. What goes wrong in it is kept as the `error` of the requests concerned."""
        with self._lock:
            self._scheduler.admit()
            work = self._scheduler.schedule()
            if work is None:
                return
            requests = (work.request,) if isinstance(work, Prefill) else work.requests
            try:
                logits = self._prefill(work) if isinstance(work, Prefill) else self._decode(work)
            except Exception as error:
                for request in requests:
                    request.error = error
            else:
                for request, logits_V in zip(requests, logits, strict=True):
                    if request.prefilled:
                        self._accept(request, logits_V)
            for request in requests:
                if request.done:
                    self.cancel(request)

    def score_pieces(self, token_ids: Sequence[int]) -> Iterator[Float32]:
        """Teacher-forced logits [n, vocab] of consecutive tokens, piece by piece, over caches of their own."""
        cache = self._session.new_caches(self._layouts, self._max_context)
        try:
            for start, count in split_at_chunks(0, len(token_ids), self._chunk, self._score_tokens):
                with self._lock:
                    cache.reserve(1, start + count)
                    tokens = token_ids[start : start + count]
                    logits = self._run([tokens], [start], cache.slot(0), np.arange(count)[None], cache)
                yield logits[0]
        finally:
            with self._lock:
                self._session.release()

    def _prefill(self, work: Prefill) -> Float32:
        """Read a piece of a prompt; returns the logits [1, vocab] after its last token."""
        request, start = work.request, work.request.position
        # Room for the whole prompt and the first token at once, rather than growing on the way.
        self._reserve(len(request.prompt_ids) + 1)
        tokens = request.prompt_ids[start : start + work.count]
        last = np.array([[work.count - 1]], dtype=np.int64)
        logits = self._run([tokens], [start], self._cache.slot(work.slot), last, self._cache)
        request.position += work.count
        return logits[:, 0]

    def _decode(self, work: Decode) -> Float32:
        """One token for every running request; returns logits [batch, vocab]."""
        positions = [request.position for request in work.requests]
        self._reserve(max(positions) + 1)
        tokens = [[request.output_ids[-1]] for request in work.requests]
        caches = self._cache.prefix(len(work.requests))
        logits = self._run(tokens, positions, caches, np.zeros((len(tokens), 1), dtype=np.int64), self._cache)
        for request in work.requests:
            request.position += 1
        return logits[:, 0]

    def _reserve(self, tokens: int) -> None:
        self._cache.reserve(len(self._scheduler.running), min(tokens, self._max_context))

    def _run(
        self,
        tokens: Sequence[Sequence[int]],  # [B][S]
        positions: Sequence[int],  # [B], of each row's first new token
        caches: CacheView[Any],
        logit_rows_BR: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        cache: Caches,
    ) -> Float32:
        embeddings = np.stack([self._embed(row) for row in tokens])
        steps = np.arange(embeddings.shape[1], dtype=np.int64)
        return self._session.run(
            Step(
                embeddings_BSH=embeddings,
                positions_BS=np.array(positions, dtype=np.int64)[:, None] + steps,
                logit_rows_BR=np.ascontiguousarray(logit_rows_BR, dtype=np.int64),
                past_length_B=cache.past_lengths(positions),
                caches=caches,
            )
        )

    def _accept(self, request: Request, logits_V: Float32) -> None:
        try:
            request.accept(logits_V)
        except Exception as error:
            request.error = error
