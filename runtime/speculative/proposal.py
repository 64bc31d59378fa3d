"""Tokens that are guessed ahead, for the model to verify all in one step: what a proposer gives and what it is asked.

Reading a model's weights is what a decode step costs, so a step of several tokens costs little more than one of one. The
model's own choice is computed for each proposed token; those up to the first that it would not have made stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from corral.runtime.request import Request
from corral.runtime.sampler import Candidates


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow a request's own, in order.

    `drawn_from` has the distribution that each was drawn from at random. It is empty where they were not: then a token
    stands if the model's draw comes out the same, which leaves every draw as it would have been.
    """

    tokens: tuple[int, ...] = ()
    drawn_from: tuple[Candidates, ...] = ()


class Proposer(Protocol):
    """Guesses ahead for requests that decode."""

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Proposal]:
        """For request i at most `most[i]` tokens; none is a proposal, too."""

    def forget(self, request: Request) -> None:
        """The request is gone; no harm where it was never seen."""
