"""What an engine's graph computes, evaluated on the CPU in the engine's place: an emulation, for no one has run the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from corral.runtime.kv_cache import KvCache
from corral.runtime.session import Float32, Step
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.kv_layout import KvLayout

Values = Mapping[str, NDArray[Any]]  # by name


class EngineGraph:
    """A session over a lowered graph. `evaluate` gives all outputs for all inputs; caches are copied, not written in place."""

    def __init__(self, evaluate: Callable[[Values], Values]) -> None:
        self._evaluate = evaluate

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def run(self, step: Step) -> Float32:
        caches = {graph_io.past_key(i): (graph_io.present_key(i), a) for i, a in enumerate(step.caches.keys)}
        caches |= {graph_io.past_value(i): (graph_io.present_value(i), a) for i, a in enumerate(step.caches.values)}
        found = self._evaluate(
            {
                graph_io.EMBEDDINGS: step.embeddings_BSH,
                graph_io.POSITIONS: step.positions_BS,
                graph_io.LOGIT_ROWS: step.logit_rows_BR,
                **{graph_io.past_length(kv_class): rows for kv_class, rows in step.past_length_B.items()},
                **{past: array for past, (_, array) in caches.items()},
            }
        )
        for present, array in caches.values():
            array[...] = found[present]
        return found[graph_io.LOGITS]

    def release(self) -> None: ...


def as_ready(bundle: Bundle) -> Bundle:
    """A lowered bundle as if it had its engine, to be opened with a session of its own."""
    return Bundle(bundle.directory, dataclasses.replace(bundle.manifest, stage="ready"))
