"""Cutting layers into ranges, against trying every way to cut."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from corral.spec.layer_ranges import balanced_ranges, fitting_ranges

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=8)


def every_way(sizes: list[int], count: int) -> list[list[tuple[int, int]]]:
    return [list(pairwise([0, *cuts, len(sizes)])) for cuts in combinations(range(1, len(sizes)), count - 1)]


def largest(sizes: list[int], ranges: list[tuple[int, int]]) -> int:
    return max(sum(sizes[first:end]) for first, end in ranges)


@given(SIZES, st.data())
def test_balanced_ranges_have_the_least_largest_sum(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    found, ways = balanced_ranges(sizes, count), every_way(sizes, count)
    assert found in ways
    assert largest(sizes, found) == min(largest(sizes, way) for way in ways)


@given(SIZES, st.integers(0, 60))
def test_fitting_ranges_are_the_fewest_that_fit(sizes: list[int], limit: int) -> None:
    found = fitting_ranges(sizes, limit)
    fitting = [way for n in range(1, len(sizes) + 1) for way in every_way(sizes, n) if largest(sizes, way) <= limit]
    if found is None:
        assert not fitting
    else:
        assert found in fitting
        assert len(found) == min(map(len, fitting))


def test_by_hand() -> None:
    assert balanced_ranges([1, 1, 1, 3], 2) == [(0, 3), (3, 4)]
    assert balanced_ranges([5, 0, 0], 3) == [(0, 1), (1, 2), (2, 3)]
    assert fitting_ranges([2, 2, 2], 4) == [(0, 2), (2, 3)]
    assert fitting_ranges([2, 5, 2], 4) is None
