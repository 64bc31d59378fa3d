"""What runs a lowered graph in ONNX's reference evaluator, and tokens whose routing no rounding decides on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from corral.model.text import Llama4Text
from corral.spec.bundle import Bundle
from corral.validate.engine_graph import EngineGraph

ROUTING_GAP = 3e-3  # of router logits; 5e-4 was seen to be rounded away


@pytest.fixture(scope="session")
def evaluator() -> Callable[..., EngineGraph]:
    """`evaluator(bundle, operators)`: a session; `operators` are what the graph calls besides ONNX's own."""
    return _evaluator


@pytest.fixture(scope="session")
def clearly_routed() -> Callable[[Llama4Text, int], list[int]]:
    """`clearly_routed(model, 24)`."""
    return _clearly_routed


def _evaluator(bundle: Bundle, operators: Sequence[type[OpRun]] = ()) -> EngineGraph:
    (record,) = bundle.manifest.graphs
    graph = ReferenceEvaluator(str(bundle.path(record.path)), new_ops=list(operators))
    return EngineGraph(lambda inputs: dict(zip(graph.output_names, graph.run(None, dict(inputs)), strict=True)))


def _clearly_routed(model: Llama4Text, count: int) -> list[int]:
    """Random tokens for which float16's error before a router decides on no expert: another one would be another answer,
    not a coarser one. As many tokens as experts visit most of them.
    """
    k, gaps, visited = model.config.num_experts_per_tok, list[float](), set[int]()
    experts = model.config.num_local_experts

    def note(router: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        ordered = logits.sort(-1, descending=True)
        gaps.append((ordered.values[..., k - 1] - ordered.values[..., k]).min().item())
        visited.update(ordered.indices[..., :k].flatten().tolist())

    routers = [module for name, module in model.named_modules() if name.endswith("router")]
    hooks = [router.register_forward_hook(note) for router in routers]
    try:
        for seed in range(1000):
            ids = np.random.default_rng([count, seed]).integers(0, 256, count).tolist()
            gaps.clear()
            visited.clear()
            with torch.no_grad():
                model.logits(torch.tensor([ids]))
            many = not gaps or count < experts or len(visited) > experts // 2
            if many and min(gaps, default=1.0) > ROUTING_GAP:
                return ids
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("no clearly routed tokens")
