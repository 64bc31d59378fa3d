"""Which of several builds are worth a look: those that no other beats in everything that counts."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[Sequence[float]]) -> tuple[bool, ...]:
    """For each point, whether it lies on the Pareto front. A point is a row of costs, each better where it is lower.

    A point is off the front where another is as good in every cost and better in one; of equal points all are on it.
    NaN, which is no measurement, is worse than any number.
    """
    rows = [tuple(float("inf") if cost != cost else cost for cost in point) for point in costs]
    return tuple(not any(_dominates(other, point) for other in rows) for point in rows)


def _dominates(better: tuple[float, ...], worse: tuple[float, ...]) -> bool:
    return better != worse and all(a <= b for a, b in zip(better, worse, strict=True))
