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
from corral.runtime.kv_cache import KvCache
from corral.runtime.session import Session, Step
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.kv_layout import KvLayout


@pytest.fixture(scope="session")
def evaluator() -> Callable[..., Session]:
    """`evaluator(bundle, operators)`: a session; `operators` are what the graph calls besides ONNX's own."""
    return Evaluator


@pytest.fixture(scope="session")
def clearly_routed() -> Callable[[Llama4Text, int], list[int]]:
    """`clearly_routed(model, 24)`."""
    return _clearly_routed


class Evaluator:
    """A session over a lowered graph in ONNX's reference evaluator."""

    def __init__(self, bundle: Bundle, operators: Sequence[type[OpRun]] = ()) -> None:
        (record,) = bundle.manifest.graphs
        self._evaluator = ReferenceEvaluator(str(bundle.path(record.path)), new_ops=list(operators))

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def run(self, step: Step) -> np.ndarray:
        caches = {graph_io.past_key(i): (graph_io.present_key(i), a) for i, a in enumerate(step.caches.keys)}
        caches |= {graph_io.past_value(i): (graph_io.present_value(i), a) for i, a in enumerate(step.caches.values)}
        feeds: dict[str, Any] = {
            graph_io.EMBEDDINGS: step.embeddings_BSH,
            graph_io.POSITIONS: step.positions_BS,
            graph_io.LOGIT_ROWS: step.logit_rows_BR,
            **{graph_io.past_length(kv_class): rows for kv_class, rows in step.past_length_B.items()},
            **{past: array for past, (_, array) in caches.items()},
        }
        names = self._evaluator.output_names
        out = dict(zip(names, self._evaluator.run(None, feeds), strict=True))
        for present, array in caches.values():
            array[...] = out[present]
        return out[graph_io.LOGITS]

    def release(self) -> None: ...


def _clearly_routed(model: Llama4Text, count: int) -> list[int]:
    """Random tokens for which float16's error before a router decides on no expert; most experts are visited."""
    k, gaps, visited = model.config.num_experts_per_tok, list[float](), set[int]()

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
            if min(gaps) > 3e-3 and len(visited) > model.config.num_local_experts // 2:
                return ids
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("no clearly routed tokens")
