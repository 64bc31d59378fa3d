from __future__ import annotations

import math

import numpy as np
import pytest

from corral.validate.statistics import Estimate, distribution, estimate, exponential, quantiles, spread


def windows(*values: list[float]) -> list[np.ndarray]:
    return [np.array(v) for v in values]


def test_equal_windows_give_the_standard_error_of_their_means() -> None:
    # Window means 1, 2, 6: mean 3, sample variance 7, standard error sqrt(7 / 3).
    found = estimate(windows([0.0, 2.0], [1.0, 3.0], [5.0, 7.0]))
    assert found.mean == pytest.approx(3.0)
    assert found.stderr == pytest.approx(math.sqrt(7 / 3))


def test_unequal_windows_weigh_by_their_predictions() -> None:
    # mean 2; deviations summed: -2 in one window (two of -1), +2 in the other; sqrt(2 / 1 * 8) / 3
    found = estimate(windows([1.0, 1.0], [4.0]))
    assert found.mean == pytest.approx(2.0)
    assert found.stderr == pytest.approx(math.sqrt(2 * 8) / 3)


def test_predictions_that_move_together_in_a_window_widen_the_error() -> None:
    together = windows([1.0] * 50, [3.0] * 50)
    apart = windows([1.0, 3.0] * 25, [1.0, 3.0] * 25)
    assert estimate(together).mean == estimate(apart).mean == 2.0
    assert estimate(together).stderr == pytest.approx(1.0)
    assert estimate(apart).stderr == pytest.approx(0.0)


def test_one_window_falls_back_to_its_predictions() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert estimate(windows(values)).stderr == pytest.approx(np.std(values, ddof=1) / 2)


def test_one_prediction_has_no_error() -> None:
    assert math.isnan(estimate(windows([1.0])).stderr)


def test_standard_error_is_honest_about_what_it_estimates() -> None:
    # Over many samples, the means spread as wide as the standard error says on average: within 5 %, which is four
    # times the 1.1 % to which 4000 samples tell it.
    random = np.random.default_rng(0)
    samples = random.normal(0, 1, (4000, 40, 1)) + random.normal(0, 1, (4000, 40, 16))
    found = [estimate(list(sample)) for sample in samples]
    assert np.std([f.mean for f in found]) == pytest.approx(np.mean([f.stderr for f in found]), rel=0.05)


def test_distribution_has_the_percentiles_of_all_predictions() -> None:
    found = distribution([np.arange(0.0, 51.0), np.arange(51.0, 101.0)])
    assert (found.mean, found.p50, found.p95, found.p99, found.max) == (50.0, 50.0, 95.0, 99.0, 100.0)


def test_exponential_carries_the_error_along() -> None:
    found = exponential(Estimate(math.log(4.0), 0.01))
    assert found.mean == pytest.approx(4.0)
    assert found.stderr == pytest.approx(0.04)


def test_exponential_of_a_hopeless_model_is_still_a_number() -> None:
    assert math.isfinite(exponential(Estimate(1e6, 0.0)).mean)


def test_spread_of_repeated_runs() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.min, found.max, found.p25, found.p75, found.n) == (3.0, 1.0, 5.0, 2.0, 4.0, 5)


def test_percentiles_with_too_few_samples_are_not_given() -> None:
    for n, known in ((5, ""), (6, "p50"), (71, "p50"), (72, "p50 p95"), (367, "p50 p95"), (368, "p50 p95 p99")):
        found = quantiles(range(n))
        assert " ".join(p for p in ("p50", "p95", "p99") if getattr(found, p) is not None) == known
        assert found.n == n


def test_six_measurements_hold_the_median_between_their_extremes() -> None:
    # All six on one side of it: twice 1 in 64, 3.1 %.
    p50 = quantiles([3.0, 1.0, 2.0, 6.0, 4.0, 5.0]).p50
    assert p50 is not None and (p50.low, p50.value, p50.high) == (1.0, 3.5, 6.0)


def test_intervals_hold_the_true_percentile_as_often_as_they_say() -> None:
    # Of 2000 samples, at least 95 % less four standard errors.
    random = np.random.default_rng(0)
    inside = {"p50": 0, "p95": 0}
    for sample in random.random((2000, 120)):
        found = quantiles(sample.tolist())
        for name, truth in (("p50", 0.5), ("p95", 0.95)):
            quantile = getattr(found, name)
            inside[name] += quantile.low <= truth <= quantile.high
    assert min(inside.values()) >= 2000 * (0.95 - 4 * math.sqrt(0.95 * 0.05 / 2000))
