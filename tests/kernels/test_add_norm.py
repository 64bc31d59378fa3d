"""corral.cpu::AddRmsNorm against float64, against itself in other batches, and against bad input."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from corral.spec.cpu_ops import DOMAIN, VERSION

pytestmark = pytest.mark.usefixtures("cpu_kernels")

Array = NDArray[Any]
Open = Callable[..., ort.InferenceSession]
EXAMPLES = 8 if "CORRAL_TEST_LIBRARY" in os.environ else 30
EPSILON = 1e-5
RNG = np.random.default_rng(0)
X, RESIDUAL = RNG.standard_normal((2, 3, 37, 80)).astype(np.float32)
WEIGHT = RNG.standard_normal(80).astype(np.float32)


def add_norm(
    open_session: Open,
    x: Array,
    weight: Array,
    residual: Array | None = None,
    *,
    threads: int = 1,
    epsilon: float = EPSILON,
    wants_sum: bool = True,
) -> list[Array]:
    feeds = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    outputs = ["y", "sum"] if wants_sum else ["y"]
    node = helper.make_node("AddRmsNorm", list(feeds), outputs, domain=DOMAIN, epsilon=epsilon)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feeds],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return open_session(helper.make_model(graph, opset_imports=imports, ir_version=10), threads).run(None, feeds)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1, 16), (1, 5, 256), (2, 40, 33), (3, 1), (7, 64)]),
    scale=st.sampled_from([1e-4, 1.0, 1e6]),
    adds=st.booleans(),
    wants_sum=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_norm_is_exact_to_float32(
    open_session: Open, seed: int, shape: tuple[int, ...], scale: float, adds: bool, wants_sum: bool
) -> None:
    rng = np.random.default_rng(seed)
    x, residual = (scale * rng.standard_normal((2, *shape))).astype(np.float32)
    weight = rng.standard_normal(shape[-1]).astype(np.float32)
    total = x + residual if adds else x
    got = add_norm(open_session, x, weight, residual if adds else None, wants_sum=wants_sum)
    wide = total.astype(np.float64)
    want = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPSILON) * weight
    assert np.abs(got[0] - want).max() < 1e-6 * np.abs(want).max()
    assert not wants_sum or np.array_equal(got[1], total)


def test_bits_depend_neither_on_batch_nor_threads_nor_instruction_set(open_session: Open, forced: Any) -> None:
    want = add_norm(open_session, X, WEIGHT, RESIDUAL)
    assert all(map(np.array_equal, add_norm(open_session, X, WEIGHT, RESIDUAL, threads=3), want))
    for rows in (slice(0, 1), slice(1, 3)):
        got = add_norm(open_session, X[rows, 5:6], WEIGHT, RESIDUAL[rows, 5:6])
        assert all(np.array_equal(part, whole[rows, 5:6]) for part, whole in zip(got, want, strict=True))
    for instruction_set in ("portable", "avx2", "avx512_vnni"):
        with forced(instruction_set):
            assert all(map(np.array_equal, add_norm(open_session, X, WEIGHT, RESIDUAL), want))


def test_a_sum_that_came_before_gives_the_same_bits(open_session: Open) -> None:
    """Where two stages meet, the sum is one's and the norm the other's."""
    y, total = add_norm(open_session, X, WEIGHT, RESIDUAL)
    assert np.array_equal(add_norm(open_session, total, WEIGHT)[0], y)


def test_what_is_not_a_number_stays_in_its_row(open_session: Open) -> None:
    x = X.copy()
    x[1, 5, 7] = np.nan
    got, want = (add_norm(open_session, values, WEIGHT, RESIDUAL)[0] for values in (x, X))
    assert np.isnan(got[1, 5]).all()
    got[1, 5] = want[1, 5]
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": X[..., :-1]}, r"x has shape \[3, 37, 79\], expected float values \[\.\.\., 80\]"),
        ({"weight": WEIGHT[None]}, r"weight has shape \[1, 80\], expected \[H\]"),
        ({"residual": RESIDUAL[:1]}, r"residual has shape \[1, 37, 80\], expected that of x"),
        ({"epsilon": -1.0}, "epsilon is below zero"),
    ],
)
def test_what_does_not_fit_is_refused(open_session: Open, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        add_norm(open_session, **{"x": X, "weight": WEIGHT, "residual": RESIDUAL, **changes})
