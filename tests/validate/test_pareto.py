"""The Pareto front: worked by hand, and against what defines it."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.validate.pareto import pareto_front

# Few values, so that ties are common.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy
POINTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12)


def test_a_front_worked_by_hand() -> None:
    # Cheapest, between, best; then one that the second beats in both, and one that ties with it in one.
    assert pareto_front([(9, 1), (5, 3), (1, 8), (6, 4), (5, 4)]) == (True, True, True, False, False)


def test_equal_points_stand_or_fall_together() -> None:
    assert pareto_front([(1, 1), (1, 1), (2, 2), (2, 2)]) == (True, True, False, False)


def test_what_was_not_measured_beats_nothing() -> None:
    assert pareto_front([(1.0, math.nan), (1.0, 5.0)]) == (False, True)
    assert pareto_front([]) == ()


@unhurried
@given(POINTS)
def test_on_the_front_is_what_nobody_beats_and_off_it_what_the_front_beats(points: list[tuple[int, int, int]]) -> None:
    front = pareto_front(points)
    on = [point for point, is_on in zip(points, front, strict=True) if is_on]
    for point, is_on in zip(points, front, strict=True):
        beaten = [o for o in on if all(a <= b for a, b in zip(o, point, strict=True)) and sum(o) < sum(point)]
        assert bool(beaten) != is_on


@unhurried
@given(POINTS)
def test_the_order_of_points_and_the_unit_of_a_cost_do_not_matter(points: list[tuple[int, int, int]]) -> None:
    front = dict(zip(points, pareto_front(points), strict=True))
    turned = points[::-1]
    assert [front[p] for p in turned] == list(pareto_front([(a, 10.0**b, c) for a, b, c in turned]))
