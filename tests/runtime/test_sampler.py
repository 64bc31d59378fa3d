"""The sampler's filters, as properties over random logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.runtime import sampler
from corral.runtime.sampler import Candidates
from corral.runtime.sampling_params import SamplingParams
from corral.spec.errors import CheckFailed, InputError

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=40).map(
    lambda values: np.array(values, dtype=np.float32)
)
SHARES = st.floats(0.01, 0.99)


def sample(logits: np.ndarray, params: SamplingParams, generator: np.random.Generator, **context: Any) -> int:
    return sampler.draw(sampler.distribution(logits, params, **context), generator.random())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def candidates(logits: np.ndarray) -> Candidates:
    return sampler.weigh(logits, 1.0)


@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_largest(logits: np.ndarray) -> None:
    chosen = sample(logits, SamplingParams(temperature=0), np.random.default_rng(0))
    assert chosen == min(np.flatnonzero(logits == logits.max()))


@given(LOGITS, SHARES)
def test_top_p_keeps_the_smallest_set_of_the_likeliest(logits: np.ndarray, top_p: float) -> None:
    p = softmax(logits)
    kept = sampler.keep_top_p(candidates(logits), top_p).ids
    assert p[kept].sum() >= top_p - 1e-9
    assert p[kept].sum() - p[kept].min() < top_p + 1e-9
    assert p[kept].min() >= max(np.delete(p, kept), default=0)


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_exactly_k_of_the_likeliest_lowest_ids_first(logits: np.ndarray, k: int) -> None:
    kept = sampler.keep_top_k(candidates(logits), k).ids
    assert kept.tolist() == sorted(np.argsort(-softmax(logits), kind="stable")[:k].tolist())


@given(LOGITS, SHARES)
def test_min_p_is_relative_to_the_likeliest(logits: np.ndarray, min_p: float) -> None:
    p = softmax(logits)
    kept = set(sampler.keep_min_p(candidates(logits), min_p).ids.tolist())
    assert {int(i) for i in np.flatnonzero(p > min_p * p.max() * (1 + 1e-9))} <= kept
    assert kept <= {int(i) for i in np.flatnonzero(p >= min_p * p.max() * (1 - 1e-9))}


@given(LOGITS, st.integers(0, 2**32))
def test_each_filter_bounds_what_is_drawn(logits: np.ndarray, seed: int) -> None:
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.05)
    chosen = sample(logits, params, np.random.default_rng(seed))
    kept = sampler.keep_min_p(sampler.weigh(logits, 0.7), 0.05)
    kept = sampler.keep_top_p(sampler.keep_top_k(kept, 5), 0.8)
    assert chosen in kept.ids


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.0, 0.3, 0.2]) + 1e-30).astype(np.float32)
    uniform = (np.arange(10_000) + 0.5) / 10_000
    drawn = np.bincount([sampler.draw(candidates(logits), u) for u in uniform], minlength=4) / 10_000
    np.testing.assert_allclose(drawn, [0.5, 0.0, 0.3, 0.2], rtol=0, atol=2e-4)


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1, 0)])
def test_impossible_tokens_are_never_drawn(uniform: float) -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.0])
    assert sampler.draw(Candidates(np.arange(4), weights), uniform) in (1, 2)


def test_low_temperature_approaches_greedy_without_overflow() -> None:
    logits = np.array([1e4, 1e4 + 1, -1e4], dtype=np.float32)
    params = SamplingParams(temperature=1e-9)
    assert {sample(logits, params, np.random.default_rng(i)) for i in range(20)} == {1}


def test_repetition_penalty_weakens_seen_tokens_of_either_sign() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    penalized = sampler.penalize(np.array([4.0, -4.0, 4.0, -4.0]), params, prompt_ids=[0, 0], output_ids=[1])
    assert penalized.tolist() == [2.0, -8.0, 4.0, -4.0]


def test_presence_counts_once_and_frequency_every_time_in_the_output_only() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    penalized = sampler.penalize(np.zeros(4), params, prompt_ids=[3], output_ids=[1, 2, 2, 2])
    assert penalized.tolist() == [0.0, -1.5, -2.5, 0.0]


@given(LOGITS)
def test_no_function_changes_the_logits_it_is_given(logits: np.ndarray) -> None:
    before = logits.copy()
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1, frequency_penalty=1, top_k=3, top_p=0.5)
    forbidden = (0,) if len(logits) > 1 else ()
    sample(logits, params, np.random.default_rng(0), prompt_ids=[0], output_ids=[0], forbidden=forbidden)
    sampler.token_logprobs(logits, 0, 3)
    assert np.array_equal(logits, before)


def test_forbidden_tokens_are_not_chosen() -> None:
    logits = np.array([9.0, 1.0, 0.0], dtype=np.float32)
    params = SamplingParams(temperature=0)
    assert sample(logits, params, np.random.default_rng(0), forbidden=(0,)) == 1


@given(LOGITS, st.integers(0, 5))
def test_logprobs_are_the_log_softmax_likeliest_first(logits: np.ndarray, count: int) -> None:
    logprobs = sampler.token_logprobs(logits, len(logits) - 1, count)
    p = softmax(logits)
    assert math.isclose(logprobs.logprob, math.log(p[-1]), rel_tol=1e-9, abs_tol=1e-12)
    assert [i for i, _ in logprobs.top] == np.argsort(-p, kind="stable")[:count].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        sample(np.array([0.0, value], dtype=np.float32), SamplingParams(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": math.nan}, {"temperature": "1"},
        {"top_k": -2}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"stop": [""]},
        {"stop": (1,)}, {"presence_penalty": 3}, {"seed": -1}, {"seed": True}, {"logprobs": -1}, {"min_tokens": 200},
        {"ignore_eos": 1},
    ],
)  # fmt: skip
def test_impossible_wishes_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_stop_may_be_one_string_or_a_list() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
