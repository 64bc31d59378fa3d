"""schedule -> run -> postprocess: moves every request one step on; several callers may share it.

A request's result does not depend on its neighbours: each has its own slot, position, generator and text. Whoever waits
for a request steps the engine, so requests of several callers (a stream and a batch, threads) advance together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from corral.runtime import sampler
from corral.runtime.forward import forward
from corral.runtime.give_back import WORTH_BYTES, give_memory_back
from corral.runtime.kv_cache import KvCache
from corral.runtime.prefix_cache import PrefixCache
from corral.runtime.request import Request
from corral.runtime.sampler import Candidates
from corral.runtime.scheduler import Decode, Prefill, Scheduler
from corral.runtime.session import Caches, CacheView, Float32, Session
from corral.runtime.speculative.proposal import Proposal, Proposer
from corral.spec.errors import InputError, Overloaded
from corral.spec.kv_layout import KvLayout, split_at_chunks

# Tokens of a round: enough to fill the matrix units, little enough for activations to stay small and others not to wait.
STEP_TOKENS = 512
# Requests in line: each is only its prompt's ids, but who asks that much should be told to come back later.
MAX_WAITING = 1024
# Most logits computed at a time while scoring (256 MiB of float32).
SCORE_LOGITS = 64 << 20


T = TypeVar("T")


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
        proposer: Proposer | None = None,
        num_proposed: int = 0,  # tokens at a time, at most
        prefix_bytes: int = 0,  # of cache rows that are kept for prompts that begin alike
        wide_batches: bool = True,  # whether several sequences may have several tokens each in one step
    ) -> None:
        self._session, self._embed, self._layouts = session, embed, tuple(layouts)
        self._proposer, self._num_proposed, self._wide_batches = proposer, num_proposed, wide_batches
        self._step_tokens = step_tokens
        self._max_context, self._max_waiting = max_context, max_waiting
        self._chunk = next((layout.chunk for layout in layouts if layout.chunk), None)
        self._score_tokens = max(1, min(step_tokens, SCORE_LOGITS // vocab_size))
        self._cache = session.new_caches(layouts, max_context)
        self._prefixes: PrefixCache | None = None  # rows on a device are not copied back
        if prefix_bytes and isinstance(self._cache, KvCache):
            self._prefixes = PrefixCache(self._cache, layouts, prefix_bytes)
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
            if request in self._scheduler.running:
                slot = self._scheduler.running.index(request)
                self._keep(request, slot)
                if request.error is not None:
                    # Its rows may hold NaN, which a later tenant's masked attention would turn into NaN again.
                    self._cache.wipe(slot)
            for move in self._scheduler.remove(request):
                self._cache.move(move.source, move.target, self._scheduler.running[move.target].position)
            if self._proposer:
                self._proposer.forget(request)
            if self.idle and self._cache.num_slots:
                large = isinstance(self._cache, KvCache) and self._cache.bytes >= WORTH_BYTES
                # Frees memory, and spares backends that look at a cache's whole capacity.
                self._cache.clear()
                self._session.release()
                if large:
                    give_memory_back()

    def step(self) -> None:
        """Do one piece of work. What goes wrong in it is kept as the `error` of the requests concerned."""
        with self._lock:
            self._scheduler.admit()
            work = self._scheduler.schedule()
            if work is None:
                return
            requests = (work.request,) if isinstance(work, Prefill) else work.requests
            try:
                if isinstance(work, Prefill):
                    self._prefill(work)
                else:
                    self._decode(work)
            except Exception as error:
                for request in requests:
                    request.error = error
            for request in requests:
                if request.done:
                    self.cancel(request)

    def with_prefixes(self, use: Callable[[PrefixCache], T]) -> T:
        """What `use` makes of the prefix cache, while nobody else does. Raises InputError where there is none."""
        if self._prefixes is None:
            raise InputError(
                "there is no prefix cache: prefix_cache_gb is 0, or the bundle's caches are on a GPU, where there is none. "
                "Open a bundle for the CPU with a larger prefix_cache_gb."
            )
        with self._lock:
            return use(self._prefixes)

    def score_pieces(self, token_ids: Sequence[int]) -> Iterator[Float32]:
        """Teacher-forced logits [n, vocab] of consecutive tokens, piece by piece, over caches of their own."""
        cache = self._session.new_caches(self._layouts, self._max_context)
        try:
            for start, count in split_at_chunks(0, len(token_ids), self._chunk, self._score_tokens):
                with self._lock:
                    cache.reserve(1, start + count)
                    tokens = token_ids[start : start + count]
                    logits = self._run([tokens], [start], cache.slot(0), [range(count)], cache)
                yield logits[0]
        finally:
            with self._lock:
                self._session.release()

    def _prefill(self, work: Prefill) -> None:
        """Read a piece of a prompt; its last token gives the first of the answer."""
        request, start = work.request, work.request.position
        # Room for prompt and answer at once: growing copies the cache, and for that time there are two. Not for an answer
        # longer than the prompt, which may end long before its limit.
        self._reserve(len(request.prompt_ids) + min(request.max_tokens, len(request.prompt_ids)))
        if self._prefixes and not start:
            known = self._prefixes.restore(request.prompt_ids, work.slot)
            request.position = request.cached_tokens = known
            if known:
                return  # the rest is for the next steps
        tokens = request.prompt_ids[start : start + work.count]
        logits = self._run([tokens], [start], self._cache.slot(work.slot), [[work.count - 1]])
        request.position += work.count
        if request.prefilled:
            self._accept(request, logits[0, 0])
            self._keep(request, work.slot)

    def _keep(self, request: Request, slot: int) -> None:
        """Keep the rows of what was read for requests that begin alike, unless they may hold NaN."""
        if self._prefixes and request.error is None:
            self._prefixes.store(request.tokens_from(0)[: request.position], slot)

    def _decode(self, work: Decode) -> None:
        """One token for every running request, and as many more as were proposed and stand."""
        requests, positions = work.requests, [request.position for request in work.requests]
        proposals = self._propose(requests)
        width = 1 + max(len(proposal.tokens) for proposal in proposals)
        self._reserve(max(positions) + width)
        rows = [[request.output_ids[-1], *p.tokens] for request, p in zip(requests, proposals, strict=True)]
        # Padding is written after a row's own tokens, where the next step writes again.
        padded = [row + row[-1:] * (width - len(row)) for row in rows]
        logits = self._run(padded, positions, self._cache.prefix(len(rows)), [list(range(width))] * len(rows))
        largest: list[int | None] = [None] * (len(rows) * width)
        if any(request.only_largest for request in requests):
            largest = sampler.largest(logits.reshape(-1, logits.shape[-1]))
        for i, (request, proposal) in enumerate(zip(requests, proposals, strict=True)):
            self._verify(request, proposal, logits[i], largest[i * width : (i + 1) * width])

    def _propose(self, requests: Sequence[Request]) -> list[Proposal]:
        """Tokens to verify in the next step of `requests`, so few that no row runs over its chunk or the context."""
        if self._proposer is None or (len(requests) > 1 and not self._wide_batches):
            return [Proposal()] * len(requests)
        ends = [
            r.position - r.position % self._chunk + self._chunk if self._chunk else self._max_context for r in requests
        ]
        room = min(min(end, self._max_context) - r.position for r, end in zip(requests, ends, strict=True))
        most = max(min(self._num_proposed, room - 1, self._step_tokens // len(requests) - 1), 0)
        # A request's last token need not be proposed: the step before it gives it.
        left = [request.max_tokens - len(request.output_ids) - 1 for request in requests]
        return self._proposer.propose(requests, [min(most, count) for count in left])

    def _verify(
        self, request: Request, proposal: Proposal, logits_RV: Float32, largest_R: Sequence[int | None]
    ) -> None:
        """Take tokens from the logits until one is not the proposed one, or ends the request."""
        for row, token in enumerate((*proposal.tokens, None)):
            request.position += 1
            drawn_from = proposal.drawn_from[row] if row < len(proposal.drawn_from) else None
            self._accept(request, logits_RV[row], token, drawn_from, largest_R[row])
            if request.done or request.output_ids[-1] != token:
                return

    def _reserve(self, tokens: int) -> None:
        self._cache.reserve(len(self._scheduler.running), min(tokens, self._max_context))

    def _run(
        self,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        view: CacheView[Any],
        logit_rows: Sequence[Sequence[int]],
        cache: Caches | None = None,
    ) -> Float32:
        cache = cache or self._cache
        return forward(self._session, self._embed, cache, view, tokens, positions, logit_rows)

    def _accept(
        self,
        request: Request,
        logits_V: Float32,
        proposed: int | None = None,
        drawn_from: Candidates | None = None,
        largest: int | None = None,
    ) -> None:
        try:
            request.accept(logits_V, proposed, drawn_from, largest)
        except Exception as error:
            request.error = error
