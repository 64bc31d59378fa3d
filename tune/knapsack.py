"""One option of each list, with the least total value within a limit on the total load: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STEPS = 1 << 16  # the limit is divided into


def choose(values: Sequence[Sequence[float]], loads: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """Indices, one into each list; None where even the lightest options exceed the limit.

    Dynamic programming over the load (Kellerer, Pferschy & Pisinger 2004, section 11.5). Each load is rounded up to a step,
    so that the limit is kept; what is lost by that is at most a step a list.
    """
    best = np.zeros(STEPS + 1)  # least value of the lists so far, within each load
    taken = []
    for value, load in zip(values, loads, strict=True):
        steps = [_steps(one, limit) for one in load]
        least, which = np.full(STEPS + 1, np.inf), np.zeros(STEPS + 1, np.int32)
        for i, (worth, step) in enumerate(zip(value, steps, strict=True)):
            if step <= STEPS:
                total = best[: STEPS + 1 - step] + worth
                better = total < least[step:]
                least[step:][better], which[step:][better] = total[better], i
        best = least
        taken.append((which, steps))
    if not np.isfinite(best[STEPS]):
        return None
    left, indices = STEPS, []
    for which, steps in reversed(taken):
        indices.append(int(which[left]))
        left -= steps[indices[-1]]
    return indices[::-1]


def _steps(load: float, limit: float) -> int:
    if load <= 0:
        return 0
    return min(math.ceil(load / limit * STEPS), STEPS + 1) if limit > 0 else STEPS + 1
