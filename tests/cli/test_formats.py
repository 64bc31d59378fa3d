from __future__ import annotations

import math

import pytest

from corral.cli.formats import DASH, count, percent, seconds, seconds_range, size, with_error


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (56_100_000, "56.1 MB"), (215.5e9, "215.5 GB"), (2e12, "2.0 TB")]
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(640, "640"), (14_100_000, "14.1 M"), (107.8e9, "107.8 B")])
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0091, "9.1 ms"), (0.25, "250 ms"), (1.94, "1.9 s"), (75.2, "75 s"), (660, "11 min")]
)
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


def test_a_range_of_durations_has_one_unit() -> None:
    assert seconds_range(0.0091, 0.0088, 0.0122) == f"9.1 ms (8.8{DASH}12.2)"
    assert seconds_range(1.5, 0.9, 2.0) == f"1.5 s (0.9{DASH}2.0)"


@pytest.mark.parametrize(
    ("mean", "stderr", "decimals", "text"),
    [
        (0.0121, 0.0004, 4, "0.0121 ± 0.0004"),
        (0.00047, 0.00003, 4, "0.00047 ± 0.00003"),  # an error too small for the decimals gets more
        (1.0, 3e-9, 3, "1.000 ± 0.000"),  # but not any number of them
        (4.1e-14, 7e-16, 4, "4.1e-14 ± 7e-16"),  # what is not zero does not read as zero
        (0.0, 0.0, 4, "0.0000 ± 0.0000"),
        (5.25, None, 2, "5.25"),
        (5.25, math.nan, 2, "5.25"),
        (math.nan, 0.1, 2, DASH),
        (math.inf, 0.1, 2, DASH),
        (394.95, 5.86, 2, "394.95 ± 5.86"),
    ],
)
def test_measured_means(mean: float, stderr: float | None, decimals: int, text: str) -> None:
    assert with_error(mean, stderr, decimals=decimals) == text


def test_percent() -> None:
    assert percent(0.961, 0.002) == "96.1 ± 0.2 %"
    assert percent(1.0) == "100.0 %"
