"""Cutting a decoder's layers into consecutive ranges: one a stage, whether that is a graph or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

Range = tuple[int, int]  # first, end (exclusive)


def fitting_ranges(sizes: Sequence[int], limit: int) -> list[Range] | None:
    """The fewest ranges whose sizes each sum to at most `limit`; None where one size alone is larger."""
    if max(sizes) > limit:
        return None
    starts, filled = [0], 0
    for i, size in enumerate(sizes):  # first fit in order is least for ranges
        if filled + size > limit:
            starts, filled = [*starts, i], 0
        filled += size
    return list(pairwise([*starts, len(sizes)]))


def balanced_ranges(sizes: Sequence[int], count: int) -> list[Range]:
    """Exactly `count` ranges, none empty, whose largest sum is the least possible. `count` is at most len(sizes)."""
    assert 1 <= count <= len(sizes)
    until = [0, *accumulate(sizes)]
    # cuts[n]: for the first n sizes, the least largest sum in the number of ranges so far, and where the ranges begin.
    cuts: dict[int, tuple[int, tuple[int, ...]]] = {n: (until[n], (0,)) for n in range(1, len(sizes) + 1)}
    for ranges in range(2, count + 1):
        cuts = {
            n: min(
                (max(cuts[k][0], until[n] - until[k]), (*cuts[k][1], k)) for k in range(ranges - 1, n)
            )
            for n in range(ranges, len(sizes) + 1)
        }  # fmt: skip
    return list(pairwise([*cuts[len(sizes)][1], len(sizes)]))
