"""What followed before: `lookup` against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.speculative.prompt_lookup import LONGEST, SHORTEST, PromptLookup, lookup


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2], (3, 4, 5, 1)),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], (4, 9, 1, 2)),  # the latest of two places that match alike
        ([7, 1, 2, 3, 9, 1, 2, 4, 9, 7, 1, 2], (3, 9, 1, 2)),  # but a longer match comes first
        ([1, 2, 1, 2], (1, 2, 1, 2)),  # goes round
        ([5, 5, 5], (5, 5, 5, 5)),
        ([1, 2, 3], ()),
        ([1, 2, 3, 2], ()),  # one token is no match
        ([1], ()),
    ],
)
def test_what_followed_is_proposed(ids: list[int], found: tuple[int, ...]) -> None:
    assert lookup(np.array(ids), 4) == found


@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=40), count=st.integers(0, 6))
def test_it_is_the_latest_of_the_longest_matches(ids: list[int], count: int) -> None:
    def matched(end: int) -> int:
        """Tokens before `end` that are those at the end of `ids`, counted up to the longest that matters."""
        n = 0
        while n < min(end, LONGEST) and ids[end - 1 - n] == ids[len(ids) - 1 - n]:
            n += 1
        return n

    best = max(range(1, len(ids)), key=lambda end: (matched(end), end), default=None)
    if best is None or matched(best) < SHORTEST:
        assert lookup(np.array(ids), count) == ()
        return
    expected = list(ids)
    for i in range(count):
        expected.append(expected[best + i])
    assert lookup(np.array(ids), count) == tuple(expected[len(ids) :])


def test_a_request_is_looked_up_as_it_grows() -> None:
    request = Request((1, 2, 3, 4), SamplingParams(), max_tokens=99, eos_token_ids=(), decoder=None)
    proposer = PromptLookup()
    found = []
    for token in (1, 2, 3, 4):
        request.output_ids.append(token)
        found.append(proposer.propose([request], [2])[0].tokens)
    assert found == [(), (3, 4), (4, 1), (1, 2)]
    proposer.forget(request)
    proposer.forget(request)
    assert not proposer._histories
