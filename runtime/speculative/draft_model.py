"""Speculative decoding: a small model of the same vocabulary writes ahead, token by token, for the large one to verify.

Its caches hold every token of a request that is certain, and those it proposed last. When some of these were rejected it
goes back to where they began: what comes next overwrites them. So that nothing else is overwritten, proposals do not
reach past the attention chunk they begin in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from corral.runtime.forward import forward
from corral.runtime.request import Request
from corral.runtime.sampler import Candidates, draw
from corral.runtime.session import Float32, Session
from corral.runtime.speculative.proposal import Proposal
from corral.runtime.tokenizer import Tokenizer
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.kv_layout import KvLayout, split_at_chunks

DRAFTED_TOKENS = 5  # each costs a step of the draft


@dataclass
class _Seat:
    """A request's place in the draft's caches: `certain` tokens of it were read, then the tokens `ahead`."""

    slot: int
    certain: int = 0
    ahead: list[int] = field(default_factory=list)


class DraftModel:
    """A proposer that runs another decoder, one request at a time."""

    def __init__(
        self,
        session: Session,
        embed: Callable[[Sequence[int]], Float32],
        layouts: Sequence[KvLayout],
        *,
        max_context: int,
        step_tokens: int,
    ) -> None:
        self._session, self._embed = session, embed
        self._max_context, self._step_tokens = max_context, step_tokens
        self._chunk = next((layout.chunk for layout in layouts if layout.chunk), None)
        self._cache = session.new_caches(layouts, max_context)
        self._seats: dict[Request, _Seat] = {}

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Proposal]:
        return [self._propose(request, count) for request, count in zip(requests, most, strict=True)]

    def forget(self, request: Request) -> None:
        seat = self._seats.pop(request, None)
        if seat and request.error is not None:
            self._cache.wipe(seat.slot)  # NaN would stay
        if seat and not self._seats:
            self._cache.clear()
            self._session.release()

    def _propose(self, request: Request, most: int) -> Proposal:
        length = request.num_tokens
        if length > self._max_context:
            return Proposal()
        seat = self._seat(request)
        self._go_back(seat, request)
        # The last proposed token is not read, the others are written from `length` on.
        room = min(self._max_context, (length // self._chunk + 1) * self._chunk if self._chunk else self._max_context)
        most = min(most, room - length + 1)
        logits_V = self._catch_up(seat, request)
        if logits_V is None:
            return Proposal()
        tokens: list[int] = []
        drawn_from: list[Candidates] = []
        while len(tokens) < most:
            if tokens:
                logits_V = self._read(seat, tokens[-1:], length + len(seat.ahead))
                seat.ahead.append(tokens[-1])
            candidates = request.distribution(logits_V, ahead=tokens)
            tokens.append(draw(candidates, request.generator.random()))
            drawn_from.append(candidates)
        return Proposal(tuple(tokens), () if request.params.greedy else tuple(drawn_from))

    def _seat(self, request: Request) -> _Seat:
        if request not in self._seats:
            taken = {seat.slot for seat in self._seats.values()}
            self._seats[request] = _Seat(next(slot for slot in range(len(taken) + 1) if slot not in taken))
        return self._seats[request]

    def _go_back(self, seat: _Seat, request: Request) -> None:
        """To the last token that is certain: of those ahead, the ones that the request has taken."""
        for expected, found in zip(seat.ahead, request.tokens_from(seat.certain), strict=False):
            if expected != found:
                break
            seat.certain += 1
        seat.ahead = []

    def _catch_up(self, seat: _Seat, request: Request) -> Float32 | None:
        """Read the tokens that are certain; the logits [vocab] after the last. None where there are too many for now."""
        missing = request.tokens_from(seat.certain)
        logits_V = None
        for start, count in split_at_chunks(seat.certain, min(len(missing), self._step_tokens), self._chunk):
            logits_V = self._read(seat, request.tokens_from(start)[:count], start)
            seat.certain += count
        return logits_V if seat.certain == request.num_tokens else None

    def _read(self, seat: _Seat, tokens: Sequence[int], position: int) -> Float32:
        """Logits [vocab] after the last of `tokens`, the first of which stands at `position`."""
        self._cache.reserve(seat.slot + 1, position + len(tokens))
        view = self._cache.slot(seat.slot)
        logits = forward(self._session, self._embed, self._cache, view, [tokens], [position], [[len(tokens) - 1]])
        return logits[0, 0]


def check_draft(draft: Bundle, draft_tokenizer: Tokenizer | None, bundle: Bundle, tokenizer: Tokenizer | None) -> None:
    """Raise InputError unless the draft's token ids mean what the bundle's mean."""
    ours, theirs = bundle.manifest.model.vocab_size, draft.manifest.model.vocab_size
    if ours != theirs:
        why = f"has {theirs} token ids, and {bundle.directory} has {ours}"
    elif tokenizer and draft_tokenizer and tokenizer.vocabulary != draft_tokenizer.vocabulary:
        why = f"has another tokenizer than {bundle.directory}"
    else:
        return
    raise InputError(f"the draft {draft.directory} {why}; expected a smaller model of the same family, or none.")
