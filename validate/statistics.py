"""Many numbers -> a mean with its standard error, or percentiles; honest about what depends on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, in the unit of what was measured."""

    mean: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A mean, its standard error, and how the tail looks."""

    mean: float
    stderr: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A repeated measurement: median of `n`, the extremes, and the middle half (p25 to p75)."""

    median: float
    min: float
    max: float
    p25: float
    p75: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A percentile and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Percentiles of `n` measurements; None where so few say nothing of that one."""

    p50: Quantile | None
    p95: Quantile | None
    p99: Quantile | None
    n: int


def estimate(values: Sequence[NDArray[np.floating]]) -> Estimate:
    """Mean over all predictions, with the standard error of a cluster sample; one array a window.

    Predictions in one window share their context, so they are not independent, windows nearly are: the variance of the
    mean is W / (W - 1) * sum_w (sum of deviations in w)^2 / n^2, the ratio estimator's (Cochran 1977, eq. 6.13), which
    for equal windows is the standard error of the window means. One window alone has no spread; its predictions are
    then taken for independent, which understates.
    """
    clusters = values if len(values) > 1 else [np.asarray([value]) for value in values[0]]
    count = sum(len(cluster) for cluster in clusters)
    mean = math.fsum(float(cluster.sum(dtype=np.float64)) for cluster in clusters) / count
    if len(clusters) == 1:
        return Estimate(mean, math.nan)
    squares = math.fsum(float((cluster - mean).sum(dtype=np.float64)) ** 2 for cluster in clusters)
    return Estimate(mean, math.sqrt(squares * len(clusters) / (len(clusters) - 1)) / count)


def distribution(values: Sequence[NDArray[np.floating]]) -> Distribution:
    """`estimate`, and the percentiles of all predictions (linear between neighbours)."""
    mean, every = estimate(values), np.concatenate(values)
    p50, p95, p99, largest = np.percentile(every, [50, 95, 99, 100]).tolist()
    return Distribution(mean=mean.mean, stderr=mean.stderr, p50=p50, p95=p95, p99=p99, max=largest)


def exponential(log: Estimate) -> Estimate:
    """exp of an estimate; the standard error by the delta method."""
    value = math.exp(min(log.mean, 700.0))  # beyond that a float is infinite
    return Estimate(value, value * log.stderr)


def spread(values: Sequence[float]) -> Spread:
    """Median, extremes and quartiles of repeated measurements."""
    low, p25, median, p75, high = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    return Spread(median=median, min=low, max=high, p25=p25, p75=p75, n=len(values))


def quantiles(values: Sequence[float]) -> Quantiles:
    """p50, p95 and p99, each where its confidence interval exists: from 6, 72 and 368 measurements on."""
    ordered = sorted(values)
    p50, p95, p99 = (_quantile(ordered, share) for share in (0.5, 0.95, 0.99))
    return Quantiles(p50=p50, p95=p95, p99=p99, n=len(ordered))


def _quantile(ordered: Sequence[float], share: float) -> Quantile | None:
    """The interval is between order statistics, whatever the distribution (Hahn & Meeker 1991, section 5.2).

    How many of n measurements lie below the quantile is binomial; 2.5 % of that distribution are left on either side.
    Measurements of one run depend on each other a little: the interval is then too narrow.
    """
    n = len(ordered)
    below, low, high = 0.0, 0, 0  # low, high: ranks from 1
    for rank in range(n + 1):
        below += math.exp(
            math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
            + rank * math.log(share) + (n - rank) * math.log1p(-share)
        )  # fmt: skip
        if below <= 0.025:
            low = rank + 1
        if below >= 0.975 and not high:
            high = rank + 1
    if not 1 <= low <= high <= n:
        return None
    (value,) = np.percentile(ordered, [100 * share]).tolist()
    return Quantile(value=value, low=ordered[low - 1], high=ordered[high - 1])
