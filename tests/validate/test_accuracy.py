from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from corral.spec.errors import CheckFailed
from corral.validate import accuracy
from corral.validate.accuracy import measure_accuracy, reblock

FakeBuilds = Callable[..., Any]

EVEN = np.log([[0.5, 0.5]] * 2)
LEANING = np.log([[0.25, 0.75]] * 2)


def test_a_candidate_is_held_against_the_reference_token_by_token(fake_build: FakeBuilds) -> None:
    windows = [[0, 1, 1, 0], [0, 0, 1]]  # what comes: 1 1 0 and 0 1, so three times 1 and twice 0
    perplexity, [found] = measure_accuracy(fake_build("even", EVEN), [fake_build("leaning", LEANING)], windows)
    assert perplexity.mean == pytest.approx(2.0)
    assert found.kl.mean == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert found.kl.stderr == pytest.approx(0.0, abs=1e-9)
    expected = (0.75**-3 * 0.25**-2) ** (1 / 5)
    assert found.perplexity.mean == pytest.approx(expected, rel=1e-6)
    assert found.perplexity_ratio.mean == pytest.approx(expected / 2, rel=1e-6)
    assert found.top1_agreement.mean == 0.0
    assert found.top5_agreement.mean == 1.0


def test_a_build_agrees_with_itself(fake_build: FakeBuilds) -> None:
    table = np.random.default_rng(0).normal(0, 3, (11, 11))
    windows = np.random.default_rng(1).integers(0, 11, (4, 9)).tolist()
    _, [same] = measure_accuracy(fake_build("a", table), [fake_build("b", table)], windows)
    assert (same.kl.mean, same.kl.max, same.top1_agreement.mean, same.perplexity_ratio.mean) == (0.0, 0.0, 1.0, 1.0)
    assert same.perplexity_ratio.stderr == 0.0


def test_block_sizes_change_nothing(fake_build: FakeBuilds, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    p, q = random.normal(0, 3, (2, 13, 13))
    windows = random.integers(0, 13, (3, 10)).tolist()

    def measured(rows_p: int, rows_q: int, numbers: int) -> Any:
        monkeypatch.setattr(accuracy, "BLOCK_NUMBERS", numbers)
        return measure_accuracy(fake_build("p", p, rows=rows_p), [fake_build("q", q, rows=rows_q)], windows)

    whole = measured(100, 100, 1 << 20)
    assert measured(1, 4, 13 * 3) == whole
    assert measured(5, 2, 1) == whole


def test_logits_that_are_not_finite_name_the_build_and_the_place(fake_build: FakeBuilds) -> None:
    table = EVEN.copy()
    table[1, 0] = np.nan
    windows = [[0, 0, 0], [0, 0, 1, 0]]  # token 1 is asked in the fifth prediction
    with pytest.raises(CheckFailed, match=r"^broken gives logits that are not finite \(prediction 4\)"):
        measure_accuracy(fake_build("even", EVEN), [fake_build("broken", table)], windows)


def test_progress_counts_predictions(fake_build: FakeBuilds) -> None:
    told: list[tuple[str, float, float, str]] = []
    windows = [[0, 1, 0], [1, 1]]
    measure_accuracy(fake_build("a", EVEN), [fake_build("b", EVEN)], windows, progress=lambda *a: told.append(a))
    assert told[-1] == ("score", 3, 3, "tokens")


@pytest.mark.parametrize(("sizes", "rows", "count"), [([3, 3, 3], 2, 8), ([9], 4, 9), ([1] * 9, 4, 5), ([4, 5], 9, 9)])
def test_reblock_yields_the_same_rows_in_other_blocks(sizes: list[int], rows: int, count: int) -> None:
    every = np.arange(9 * 2, dtype=np.float32).reshape(9, 2)
    blocks = list(reblock(np.split(every, np.cumsum(sizes)[:-1]), rows, count))
    assert [len(block) for block in blocks] == [rows] * (count // rows) + [count % rows] * bool(count % rows)
    assert np.array_equal(np.concatenate(blocks), every[:count])


def test_reblock_notices_missing_rows() -> None:
    with pytest.raises(AssertionError, match="2 of 5 rows"):
        list(reblock([np.zeros((3, 2), np.float32)], 2, 5))
