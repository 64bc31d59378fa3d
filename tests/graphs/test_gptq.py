"""Searched scales and GPTQ: lower error on their own objectives, a textbook implementation, and the same bytes anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.graphs.quantize.gptq import DAMPING, gptq
from corral.graphs.quantize.hqq import hqq
from corral.graphs.quantize.rtn import rtn
from corral.graphs.quantize.rtn_mse import decode, encode, rtn_mse, search_scales

BITS, GROUP = 4, 32


Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def problem(seed: int, rows: int = 24, inputs: int = 128, tokens: int = 600) -> Problem:
    """(weight, inputs that depend on each other and differ in strength, their X^T X)."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) * rng.lognormal(0, 1, inputs)
    x = (rng.normal(size=(tokens, inputs)) @ mix + rng.normal(size=inputs)).astype(np.float32)
    return rng.normal(size=(rows, inputs)).astype(np.float32), x, (x.T @ x).astype(np.float32)


def values(stored: dict[str, np.ndarray]) -> np.ndarray:
    return decode(**stored, bits=BITS)


def output_error(weight: np.ndarray, quantized: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (quantized - weight).T.astype(np.float64)).sum())


def seen(hessian: np.ndarray, tokens: int = 600) -> dict[str, np.ndarray]:
    return {"hessian": hessian, "tokens": np.array([tokens])}


@given(seed=st.integers(0, 1000), bits=st.sampled_from([4, 8]), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_searched_scales_lower_the_squared_error_of_every_group(seed: int, bits: int, scale: float) -> None:
    weight = (np.random.default_rng(seed).standard_t(3, (4, 96)) * scale).astype(np.float32)

    def errors(stored: dict[str, np.ndarray]) -> np.ndarray:
        difference = decode(stored["codes"], stored["scales"], bits=bits) / scale - weight / scale
        return np.square(difference.astype(np.float64)).reshape(4, 3, GROUP).sum(-1)

    plain, searched = (f(weight, bits=bits, group_size=GROUP) for f in (rtn, rtn_mse))
    assert (searched["scales"] > 0).all()
    assert (errors(searched) <= errors(plain) * (1 + 1e-5)).all()


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_zero_points_lower_the_squared_error_of_every_group(seed: int, bits: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weight = ((rng.standard_t(3, (4, 96)) + rng.normal(size=(4, 1))) * scale).astype(np.float32)

    def errors(stored: dict[str, np.ndarray]) -> np.ndarray:
        difference = decode(**stored, bits=bits) / scale - weight / scale
        return np.square(difference.astype(np.float64)).reshape(4, 3, GROUP).sum(-1)

    symmetric, asymmetric = (rtn_mse(weight, bits=bits, group_size=GROUP, asymmetric=a) for a in (False, True))
    plain = rtn(weight, bits=bits, group_size=GROUP, asymmetric=True)
    assert (asymmetric["scales"] > 0).all()
    assert max(asymmetric["codes"].max(), asymmetric["zeros"].max()) < 2**bits
    assert (errors(asymmetric) <= errors(symmetric) * (1 + 1e-5)).all()
    assert (errors(asymmetric) <= errors(plain) * (1 + 1e-5)).all()


@pytest.mark.parametrize("low", [0, 3, 15])
def test_the_search_finds_exact_codes_wherever_their_zero_point_is(low: int) -> None:
    weight = np.tile(np.arange(16, dtype=np.float32) - low, 2)[None] * np.float32(0.25)
    stored = rtn_mse(weight, bits=4, group_size=32, asymmetric=True)
    assert stored["zeros"].tolist() == [[low]]
    np.testing.assert_allclose(values(stored), weight, rtol=1e-6, atol=1e-12)


def test_hqq_lowers_its_own_objective_and_zero_points_more() -> None:
    weight = np.random.default_rng(2).standard_t(3, (16, 256)).astype(np.float32) + np.float32(0.5)

    def objective(stored: dict[str, np.ndarray]) -> float:
        return float((np.abs(values(stored) - weight) ** 0.7).sum())

    searched, symmetric, asymmetric = (
        objective(quantize(weight, bits=BITS, group_size=GROUP, asymmetric=a))
        for quantize, a in ((rtn_mse, True), (hqq, False), (hqq, True))
    )
    assert asymmetric < searched
    assert asymmetric < 0.97 * symmetric


def test_the_search_finds_the_scale_of_exact_codes_behind_an_outlier() -> None:
    """One 9 among steps of 1 needs clipping (or coarse steps); 63 of 64 exact values outweigh it where they count."""
    weight = np.tile(np.arange(-4.0, 4.0, dtype=np.float32), 4)[None].copy()
    weight[0, 0] = -9.0
    importance = np.ones(32)
    importance[0] = 0
    scales = search_scales(weight, bits=4, group_size=32, importance=importance)
    np.testing.assert_allclose(scales, [[1.0]], rtol=1e-6)


@pytest.mark.parametrize("quantize", [rtn_mse, rtn])
def test_a_group_of_zeros_stays_zero(quantize: object) -> None:
    stored = quantize(np.zeros((2, 64), np.float32), bits=4, group_size=32)  # type: ignore[operator]
    assert (stored["codes"] == 8).all()
    assert (stored["scales"] == 1).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), act_order=st.booleans(), asymmetric=st.booleans())
def test_gptq_beats_rounding_on_what_comes_out(seed: int, act_order: bool, asymmetric: bool) -> None:
    weight, x, hessian = problem(seed)
    scheme: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "asymmetric": asymmetric}
    stored = gptq(weight, **scheme, min_tokens=1, statistics=seen(hessian), act_order=act_order)
    searched, plain = (values(f(weight, **scheme)) for f in (rtn_mse, rtn))
    ours = output_error(weight, values(stored), x)
    assert ours < 0.8 * output_error(weight, searched, x)
    assert ours < 0.8 * output_error(weight, plain, x)


def test_inputs_do_as_well_as_their_products() -> None:
    weight, x, products = problem(5)
    how = {"bits": BITS, "group_size": GROUP, "min_tokens": 1}
    rows = gptq(weight, **how, statistics={"rows": x, "tokens": np.array([len(x)])})  # type: ignore[arg-type]
    summed = gptq(weight, **how, statistics=seen(products))  # type: ignore[arg-type]
    assert np.mean(rows["codes"] != summed["codes"]) < 0.01  # sums in another order


def textbook(stored: dict[str, np.ndarray], weight: np.ndarray, hessian: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Optimal Brain Quantization with a fixed order, as it is derived: after each column the inverse of what is left.

    (Frantar et al. 2022, eqs. 2 and 3.) No Cholesky, no blocks: Gaussian elimination of one row and column at a time.
    """
    scales, zeros = stored["scales"], stored.get("zeros", np.full(stored["scales"].shape, 8)).astype(np.int64)
    damped = hessian.astype(np.float64) + DAMPING * np.diag(hessian).astype(np.float64).mean() * np.eye(len(hessian))
    inverse, left = np.linalg.inv(damped), weight.astype(np.float64).copy()
    codes = np.zeros(weight.shape, np.int64)
    for j in order:
        scale, zero = scales[:, j // GROUP].astype(np.float64), zeros[:, j // GROUP]
        codes[:, j] = np.clip(np.rint(left[:, j] / scale) + zero, 0, 15)
        error = left[:, j] - (codes[:, j] - zero) * scale
        left -= np.outer(error, inverse[j]) / inverse[j, j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j], inverse[j, j] = 0, 0, 1  # done: never touched again
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("inputs", [64, 192])  # within a block, and across
def test_gptq_is_the_textbooks(act_order: bool, asymmetric: bool, inputs: int) -> None:
    weight, _, hessian = problem(3, inputs=inputs)
    scheme: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "asymmetric": asymmetric}
    stored = gptq(weight, **scheme, min_tokens=1, statistics=seen(hessian), act_order=act_order)
    assert ("zeros" in stored) == asymmetric
    diagonal = hessian.diagonal()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(inputs)
    want = textbook(stored, weight, hessian, order)
    # One rounding that float32 decides otherwise changes what comes after it in that row.
    same_rows = (stored["codes"] == want).all(axis=1)
    assert same_rows.mean() > 0.9


def test_inputs_that_never_came_do_no_harm() -> None:
    weight, x, _ = problem(5)
    x[:, 32:64] = 0
    stored = gptq(weight, bits=BITS, group_size=GROUP, min_tokens=1, statistics=seen((x.T @ x).astype(np.float32)))
    np.testing.assert_array_equal(stored["codes"][:, 32:64], encode(weight, stored["scales"], bits=BITS)[:, 32:64])
    nothing = gptq(weight, bits=BITS, group_size=GROUP, min_tokens=1, statistics=seen(np.zeros((128, 128), np.float32)))
    np.testing.assert_array_equal(nothing["codes"], rtn_mse(weight, bits=BITS, group_size=GROUP)["codes"])


def test_too_few_tokens_fall_back_to_searched_scales() -> None:
    weight, _, hessian = problem(7)
    few = gptq(weight, bits=BITS, group_size=GROUP, min_tokens=256, statistics=seen(hessian, tokens=255))
    want = rtn_mse(weight, bits=BITS, group_size=GROUP)
    np.testing.assert_array_equal(few["codes"], want["codes"])
    enough = gptq(weight, bits=BITS, group_size=GROUP, min_tokens=256, statistics=seen(hessian, tokens=256))
    assert (enough["codes"] != want["codes"]).any()


def test_the_bytes_do_not_depend_on_threads_and_they_are_left_as_they_were() -> None:
    weight, _, hessian = problem(9, rows=64, inputs=256)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stored = gptq(weight, bits=BITS, group_size=GROUP, min_tokens=1, statistics=seen(hessian))
            results.append((stored["codes"].tobytes(), stored["scales"].tobytes()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]
