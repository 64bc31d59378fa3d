from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from corral.validate.divergence import diverge, log_softmax, predict

logits = hnp.arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))


def log(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, dtype=np.float64))


def test_kl_of_two_coins_worked_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3
    came = np.array([1])
    found = diverge(predict(log([0.5, 0.5]), came), log([0.25, 0.75]), came)
    assert found.kl_n == pytest.approx([0.5 * math.log(4 / 3)], abs=1e-15)
    assert found.surprise_n == pytest.approx([-math.log(0.75)], abs=1e-15)


def test_kl_of_a_certain_reference_is_the_candidates_surprise() -> None:
    came = np.array([2])
    reference = predict(np.array([[-2000.0, -2000.0, 0.0]]), came)
    assert diverge(reference, log([0.25, 0.25, 0.5]), came).kl_n == pytest.approx([math.log(2)], abs=1e-15)
    assert reference.surprise_n == pytest.approx([0.0])


def test_kl_of_gaussian_shaped_logits_has_its_closed_form() -> None:
    # Two discretized normal distributions of the same width: KL = (a - b)^2 / 2 sigma^2.
    x, came = np.arange(-400, 401) / 10, np.array([0])
    p, q = (-((x[None] - mean) ** 2) / (2 * 3.0**2) for mean in (0.0, 2.0))
    assert diverge(predict(p, came), q, came).kl_n == pytest.approx([4 / 18], rel=1e-9)


def test_agreement_counts_rank_of_the_references_choice() -> None:
    came = np.zeros(4, dtype=np.int64)
    reference = predict(np.tile([9.0, 1, 2, 3, 4, 5, 6], (4, 1)), came)
    candidate = np.array(
        [
            [9.0, 1, 2, 3, 4, 5, 6],  # same
            [2.0, 6, 5, 4, 3, 1, 0],  # fifth
            [1.5, 6, 5, 4, 3, 2, 0],  # sixth
            [5.0, 5, 5, 5, 5, 5, 5],  # a tie is no disagreement
        ]
    )
    found = diverge(reference, candidate, came)
    assert found.same_top1_n.tolist() == [True, False, False, True]
    assert found.in_top5_n.tolist() == [True, True, False, True]


def test_large_logits_do_not_overflow() -> None:
    huge = np.array([[3e38, -3e38, 0.0]], dtype=np.float32)
    assert np.isfinite(diverge(predict(huge, np.array([0])), huge, np.array([0])).kl_n).all()
    assert log_softmax(np.array([[1e4, 1e4]])) == pytest.approx(np.full((1, 2), -math.log(2)))


@given(logits, logits)
def test_kl_is_never_negative_and_zero_for_equals(p: np.ndarray, q: np.ndarray) -> None:
    came = np.zeros(3, dtype=np.int64)
    found = diverge(predict(p, came), q, came)
    assert (found.kl_n >= 0).all()
    assert diverge(predict(p, came), p, came).kl_n.tolist() == [0.0] * 3
    apart = np.abs(np.exp(log_softmax(p)) - np.exp(log_softmax(q))).sum(axis=-1)
    # Pinsker's inequality: KL >= (total variation)^2 / 2, in the L1 norm. It also makes KL > 0 wherever p is not q.
    assert (found.kl_n >= apart**2 / 2 - 1e-12).all()


@given(logits, logits, st.floats(-100, 100), st.floats(-100, 100))
def test_kl_does_not_feel_a_shift_of_all_logits(p: np.ndarray, q: np.ndarray, a: float, b: float) -> None:
    came = np.zeros(3, dtype=np.int64)
    wide_p, wide_q = p.astype(np.float64), q.astype(np.float64)
    still = diverge(predict(wide_p, came), wide_q, came)
    shifted = diverge(predict(wide_p + a, came), wide_q + b, came)
    assert shifted.kl_n == pytest.approx(still.kl_n, rel=1e-9, abs=1e-11)
    assert shifted.surprise_n == pytest.approx(still.surprise_n, rel=1e-9, abs=1e-11)
