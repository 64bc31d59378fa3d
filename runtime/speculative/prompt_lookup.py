"""Prompt lookup decoding: what followed the last few tokens when they stood before, in prompt or output, may again.

The idea is Saxena's (https://github.com/apoorvumang/prompt-lookup-decoding). It costs no model and pays where text
repeats: editing code, quoting, summing up. The search is one comparison of the whole text with its last token, then of
the places found with the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corral.runtime.request import Request
from corral.runtime.session import Int64
from corral.runtime.speculative.proposal import Proposal

LOOKED_UP_TOKENS = 8  # more than of a draft, because they cost nothing to find
SHORTEST, LONGEST = 2, 8  # tokens that must match, and after how many more would not make a place better


def lookup(ids: Int64, count: int) -> tuple[int, ...]:
    """The `count` tokens after the latest of the longest earlier matches with the end of `ids` [n]; () without one.

    A match that reaches into what it predicts goes round: after `a b a b`, the next tokens are `a b a b …`.
    """
    ends, matched = np.flatnonzero(ids[:-1] == ids[-1]), 1
    while matched < LONGEST:
        longer = ends[ends >= matched]
        longer = longer[ids[longer - matched] == ids[len(ids) - 1 - matched]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    if matched < SHORTEST or not len(ends):
        return ()
    return tuple(np.resize(ids[ends[-1] + 1 :], count).tolist())


class PromptLookup:
    """A proposer over each request's own tokens."""

    def __init__(self) -> None:
        self._histories: dict[Request, _History] = {}

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Proposal]:
        return [
            Proposal(lookup(self._histories.setdefault(request, _History()).of(request), count))
            for request, count in zip(requests, most, strict=True)
        ]

    def forget(self, request: Request) -> None:
        self._histories.pop(request, None)


class _History:
    """A request's tokens as an array that grows, so that a step does not copy them all."""

    def __init__(self) -> None:
        self._ids: Int64 = np.empty(0, np.int64)
        self._count = 0

    def of(self, request: Request) -> Int64:
        new = request.tokens_from(self._count)
        end = self._count + len(new)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[: self._count], np.empty(2 * end - self._count, np.int64)])
        self._ids[self._count : end] = new
        self._count = end
        return self._ids[:end]
