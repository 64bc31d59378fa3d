"""The block-aligned experts alone, for any routing: a wrong count of blocks shows only where routing is extreme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.exporter.ops.custom_op import DOMAIN
from corral.graphs.lower.tensorrt.moe import lower_moe
from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec.expert_tiles import MAX_BLOCK
from corral.spec.model_config import parse_config
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import WeightPlan

HIDDEN, WIDTH, EXPERTS = 8, 4, 5


def make_session(config: dict[str, Any], k: int) -> tuple[ort.InferenceSession, np.ndarray, np.ndarray]:
    """A graph of one lowered MoE layer in float32, and its two weights."""
    small = {"num_hidden_layers": 1, "hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": k}
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((EXPERTS, HIDDEN, 2 * WIDTH)).astype(np.float32)
    down = rng.standard_normal((EXPERTS, WIDTH, HIDDEN)).astype(np.float32)
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float32, shape=ir.Shape(["tokens", HIDDEN]))
    logits = ir.Value(name="router_logits", type=float32, shape=ir.Shape(["tokens", EXPERTS]))
    weights = [
        ir.Value(name=name, type=float32, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        for name, array in (("gate_up", gate_up), ("down", down))
    ]
    node = ir.node("MoE", [x, logits, *weights], {"k": k}, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", float32, ir.Shape(["tokens", HIDDEN])
    graph = ir.Graph([x, logits], [y], nodes=[node], initializers=weights, name="g", opset_imports={"": 24, DOMAIN: 1})
    model = ir.Model(graph, ir_version=11)
    work = ModelAndPlan(
        model, WeightPlan({}), parse_config(config | small), Recipe(target="tensorrt-rtx", weights="fp16")
    )
    assert lower_moe(work)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options), gate_up, down


def expected(x: np.ndarray, logits: np.ndarray, gate_up: np.ndarray, down: np.ndarray, k: int) -> np.ndarray:
    y = np.zeros_like(x)
    for t in range(len(x)):
        for e in np.argsort(-logits[t], kind="stable")[:k]:
            gate, up = np.split(x[t] / (1 + np.exp(-logits[t, e])) @ gate_up[e], 2)
            y[t] += (gate / (1 + np.exp(-gate)) * up) @ down[e]
    return y


@pytest.fixture(scope="module", params=[1, 2])
def moe(request: pytest.FixtureRequest, tiny_config: Callable[[str], dict[str, Any]]) -> tuple[Any, ...]:
    return (*make_session(tiny_config("scout"), request.param), request.param)


# Beyond EXPERTS * MAX_BLOCK tokens blocks stop growing.
tokens = st.one_of(st.integers(1, 4 * EXPERTS), st.integers(1, 2 * EXPERTS * MAX_BLOCK))


@settings(max_examples=60, deadline=None)
@given(count=tokens, favourites=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_every_token_gets_its_experts_answer(
    moe: tuple[Any, ...], count: int, favourites: list[int], seed: int
) -> None:
    """Routing from even to all on one expert: `favourites` are chosen far more often than the others."""
    session, gate_up, down, k = moe
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, HIDDEN)).astype(np.float32)
    logits = rng.standard_normal((count, EXPERTS)).astype(np.float32)
    logits[np.arange(count), rng.choice(favourites, count)] += rng.choice([0.0, 3.0, 30.0])
    (got,) = session.run(None, {"x": x, "router_logits": logits})
    want = expected(x, logits, gate_up, down, k)
    assert np.abs(got - want).max() < 1e-4 * max(1.0, np.abs(want).max())
