"""Of what was tried, one choice a part: the best sum within the budget, held against the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from corral.tune.choice import Choice, Storage
from corral.tune.knapsack import choose
from corral.tune.parts import Part
from corral.tune.tuned import Tried

ROUNDS = 4
BELOW = 0.997  # a correction downwards goes a little further, or it would only ever come near
ENOUGH = 0.985  # of the limit in use: nothing more is looked for


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What parts weigh, what they may weigh together, and what they are worth (the less the better).

    Parts are weighed one by one; `whole` weighs a choice for all of them together, which may be up to `limit`.
    """

    load: Callable[[Tried], float]
    value: Callable[[Tried], float]
    whole: Callable[[Mapping[Part, Choice]], float]
    limit: float
    loads_limit: float  # for the sum of loads, to begin with


def select(tried: Sequence[Tried], within: Limit) -> list[Tried] | None:
    """One choice a part, of the least total value; None where none was found within the limit.

    Where the whole weighs more or less than the sum of its parts says, the sum's limit is corrected and it is chosen again.
    Where nothing so chosen keeps the limit, the lightest of all may.
    """
    options, limit = _best_methods(tried), within.loads_limit
    best: list[Tried] | None = None
    chosen: list[Tried] = []
    for _ in range(ROUNDS):
        found = choose(
            [[within.value(one) for one in ways] for ways in options],
            [[within.load(one) for one in ways] for ways in options],
            limit,
        )
        if found is None:
            break
        before, chosen = chosen, [ways[i] for ways, i in zip(options, found, strict=True)]
        if chosen == before:
            break
        weight = within.whole({one.part: one.choice for one in chosen})
        kept = weight <= within.limit
        if kept and (best is None or _total(within, chosen) < _total(within, best)):
            best = chosen
        if weight <= 0 or (kept and weight >= ENOUGH * within.limit):
            break
        limit *= within.limit / weight * (1 if kept else BELOW)
    least = lightest(tried, within)
    return best or (least if within.whole({one.part: one.choice for one in least}) <= within.limit else None)


def lightest(tried: Sequence[Tried], within: Limit) -> list[Tried]:
    """Of each part the choice that weighs least."""
    return [min(ways, key=lambda one: (within.load(one), within.value(one))) for ways in _best_methods(tried)]


def _total(within: Limit, chosen: Sequence[Tried]) -> float:
    return sum(map(within.value, chosen))


def _best_methods(tried: Sequence[Tried]) -> list[list[Tried]]:
    """For each part and storage the method of least divergence: all methods' bytes are the same."""
    best: dict[Part, dict[Storage, Tried]] = {}
    for one in tried:
        ways, storage = best.setdefault(one.part, {}), one.choice.storage
        if storage not in ways or one.kl < ways[storage].kl:
            ways[storage] = one
    return [list(ways.values()) for ways in best.values()]
