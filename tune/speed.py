"""How fast a choice decodes: timed in a build of it, and foretold from builds that store all parts alike.

A part's share of the time is its share of the weights that one token is multiplied with. So much of the time of the build
that stores all in int8 is what an int8 part takes, and in smaller groups the more, the more bytes they have. That is a first
guess: what is chosen by it is compiled and timed, and where the guess was wrong, it is chosen again.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral.spec.errors import InputError
from corral.tune.choice import METHODS_TRIED, STORAGES, Choice, Storage
from corral.tune.parts import Part
from corral.tune.sizes import Sizes
from corral.tune.timer import Chosen, Timer
from corral.tune.tuned import Budget
from corral.validate.statistics import Spread

USUAL = "int4"  # weights that every part may have


class Speeds:
    """What was timed: to begin with, for each kind of weights a build that stores all parts so, as far as it can."""

    def __init__(self, sizes: Sizes, parts: Sequence[Part], timer: Timer) -> None:
        self._sizes, self._parts, self._timer = sizes, parts, timer
        visited = {part: sizes.visited(part) for part in parts}
        self._share = {part: count / sum(visited.values()) for part, count in visited.items()}
        self._timed: dict[frozenset[tuple[Part, Storage]], tuple[Chosen, Spread]] = {}
        self._alone: dict[str, float] = {}  # weights -> seconds a token, were all parts stored so
        uniform = {weights: self._uniform(weights) for weights in sorted(METHODS_TRIED, key=USUAL.__ne__)}
        uniform = {weights: chosen for weights, chosen in uniform.items() if self._share_of(weights, chosen)}
        for chosen, speed in zip(uniform.values(), timer(list(uniform.values())), strict=True):
            self._timed[_key(chosen)] = chosen, speed
        for weights, chosen in uniform.items():  # the usual weights first: where others do not fit, parts have those
            others = sum(self.foretold(part, one.storage) for part, one in chosen.items() if one.weights != weights)
            self._alone[weights] = max(self.seconds(chosen) - others, 0.0) / self._share_of(weights, chosen)

    def foretold(self, part: Part, storage: Storage) -> float:
        """Seconds that a part takes of each token."""
        if not self._share[part]:
            return 0.0
        coarsest = self._sizes.stored(part, self._coarsest(part, storage[0]))
        return self._share[part] * self._alone[storage[0]] * self._sizes.stored(part, storage) / coarsest

    def seconds(self, chosen: Chosen) -> float:
        """Seconds a token, timed: of the median run."""
        if _key(chosen) not in self._timed:
            self._timed[_key(chosen)] = chosen, self.timed_again(chosen)
        return 1 / self._timed[_key(chosen)][1].median

    def timed_again(self, chosen: Chosen) -> Spread:
        """Tokens per second, by runs that decided nothing: what was the fastest of several was also a lucky one."""
        return self._timer([chosen])[0]

    def check(self, budget: Budget) -> None:
        """Raise InputError, naming the fastest build that was found, where nothing decodes at the speed of a budget."""
        self.seconds({part: self._quickest(part) for part in self._parts})
        chosen, found = max(self._timed.values(), key=lambda timed: timed[1].median)
        if found.median < budget.limit:
            stored = dict.fromkeys(one.weights for part, one in chosen.items() if self._share[part])
            raise InputError(
                f"nothing was found that decodes {budget} on this machine. The fastest, with its matrices in "
                f"{' and '.join(stored)}, decodes {budget.repeated(found)}. Ask for less."
            )

    def _uniform(self, weights: str) -> dict[Part, Choice]:
        """All parts in such weights, or in the usual ones; the embedding, of which a row is read, as published."""
        return {part: _plain(self._coarsest(part, "fp32" if part.is_table else weights)) for part in self._parts}

    def _quickest(self, part: Part) -> Choice:
        return _plain(min(self._fitting(part), key=lambda storage: self.foretold(part, storage)))

    def _coarsest(self, part: Part, weights: str) -> Storage:
        """Such weights in the largest groups that fit a part, or the usual ones where they do not fit at all."""
        fitting = self._fitting(part)
        return [one for wanted in (USUAL, weights) for one in fitting if one[0] == wanted][-1]

    def _fitting(self, part: Part) -> list[Storage]:
        return [storage for storage in STORAGES if self._sizes.fits(part, storage)]

    def _share_of(self, weights: str, chosen: Chosen) -> float:
        return sum(self._share[part] for part, choice in chosen.items() if choice.weights == weights)


def _plain(storage: Storage) -> Choice:
    return Choice(weights=storage[0], group_size=storage[1], method="rtn")


def _key(chosen: Chosen) -> frozenset[tuple[Part, Storage]]:
    return frozenset((part, choice.storage) for part, choice in chosen.items())
