"""moe_route on the CPU: the experts each token visits and the order of visits, against NumPy's sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from corral.graphs.engine.kernels.launch import MoeShape, buffers, launches

from .conftest import RunOnCpu, guarded

Array = NDArray[Any]


def routed(run_on_cpu: RunOnCpu, logits: Array, top_k: int) -> dict[str, Array]:
    tokens, experts = logits.shape
    shape = MoeShape(hidden=64, width=64, experts=experts, top_k=top_k, weights="fp16")
    outputs = ("expert", "visit", "gate", "offset")
    table = buffers(shape, tokens)
    made = {name: guarded(np.full(table[name][1], -1, table[name][0])) for name in outputs}
    run_on_cpu(launches(shape, tokens)[0], {"logits": guarded(logits), **made})
    return made


def expected(logits: Array, top_k: int) -> dict[str, Array]:
    """By NumPy: NaN is largest, equal logits go to the lower number, visits are sorted stably."""
    order = np.where(np.isnan(logits), np.inf, logits.astype(np.float32))
    expert = np.argsort(-order, axis=1, kind="stable")[:, :top_k].ravel()
    visit = np.argsort(expert, kind="stable")
    chosen = logits[visit // top_k, expert[visit]].astype(np.float32)
    offset = np.concatenate([[0], np.bincount(expert, minlength=logits.shape[1]).cumsum()])
    with np.errstate(over="ignore"):
        gate = 1 / (1 + np.exp(-chosen))
    return {"expert": expert, "visit": visit, "gate": gate, "offset": offset}


def assert_equal(actual: dict[str, Array], reference: dict[str, Array]) -> None:
    for name in ("expert", "visit", "offset"):
        np.testing.assert_array_equal(actual[name], reference[name], name)
    np.testing.assert_allclose(actual["gate"], reference["gate"], rtol=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (16, 1), (128, 1), (16, 2), (128, 4), (8, 8)])
@pytest.mark.parametrize("tokens", [1, 33, 1100])
def test_random_logits(tokens: int, experts: int, top_k: int, run_on_cpu: RunOnCpu) -> None:
    logits = np.random.default_rng(tokens).standard_normal((tokens, experts)).astype(np.float32)
    assert_equal(routed(run_on_cpu, logits, top_k), expected(logits, top_k))


few_values = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1.0, 65504.0, np.inf, np.nan])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logits=hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(8)), elements=few_values),
    top_k=st.integers(1, 8),
)
def test_ties_infinities_and_nan(logits: Array, top_k: int, run_on_cpu: RunOnCpu) -> None:
    assert_equal(routed(run_on_cpu, logits, top_k), expected(logits, top_k))


def test_one_expert_may_take_every_token(run_on_cpu: RunOnCpu) -> None:
    logits = np.zeros((70, 16), np.float32)
    logits[:, 11] = 1
    made = routed(run_on_cpu, logits, 1)
    assert (made["expert"] == 11).all()
    assert (made["visit"] == np.arange(70)).all()
    assert made["offset"].tolist() == [0] * 12 + [70] * 5
