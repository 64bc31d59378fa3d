from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from corral.tune.knapsack import STEPS, choose

NUMBERS = st.floats(0, 100, allow_subnormal=False)
LISTS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=4)


def best_value(lists: list[list[tuple[float, float]]], limit: float) -> float | None:
    """By trying everything."""
    sums = [tuple(map(sum, zip(*picked, strict=True))) for picked in product(*lists)]
    return min((value for value, load in sums if load <= limit), default=None)


@given(lists=LISTS, limit=st.floats(0.1, 300))
def test_the_limit_is_kept_and_nothing_is_better_but_for_rounding(
    lists: list[list[tuple[float, float]]], limit: float
) -> None:
    found = choose([[v for v, _ in one] for one in lists], [[w for _, w in one] for one in lists], limit)
    strict = best_value(lists, limit * (1 - len(lists) / STEPS))  # every load is rounded up by less than a step
    if found is None:
        assert strict is None
        return
    picked = [one[i] for one, i in zip(lists, found, strict=True)]
    assert sum(load for _, load in picked) <= limit * (1 + 1e-9)
    assert strict is None or sum(value for value, _ in picked) <= strict + 1e-9


def test_worked_by_hand() -> None:
    # 3 + 5 is over the limit; of 3 + 1 and 2 + 5, the second is worth more (costs less).
    assert choose([[9, 1], [9, 0]], [[2, 3], [1, 5]], 7.01) == [0, 1]
    assert choose([[9, 1], [9, 0]], [[2, 3], [1, 5]], 8.01) == [1, 1]
    assert choose([[1]], [[2]], 1) is None
    assert choose([[5, 1]], [[0, 0]], 1) == [1]
    # Over the limit by less than a step.
    assert choose([[1], [1]], [[0.500001], [0.500001]], 1) is None
