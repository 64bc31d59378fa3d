"""A Session over a bundle's graphs on ONNX Runtime: one stage after the other, in this process.

ONNX Runtime copies weights into its kernels' own layout when it opens a graph: as much memory again, and not the file's.
A bundle larger than memory is therefore opened *mapped*, without that layout: pages come from the file as they are
touched (of the experts only the chosen ones'), and each step takes many times longer. Bundles for corral's own kernels
are always mapped, at no cost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from corral.runtime.kv_cache import KvCache
from corral.runtime.onnxruntime_graph import PROVIDERS, OnnxRuntimeGraph, Tap
from corral.runtime.requirements import check_requirements
from corral.runtime.session import Float32, Step
from corral.runtime.stage_io import check_stages
from corral.spec.bundle import Bundle
from corral.spec.cpu_ops import LIBRARY
from corral.spec.errors import InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.machine import usable_cores, usable_memory
from corral.spec.manifest import GraphRecord

log = logging.getLogger(__name__)

# Of the memory that is free, what may be filled with weights; the rest is for caches, activations and the file's pages.
WEIGHTS_SHARE = 0.8


class OnnxRuntimeSession:
    """Runs a bundle's graphs with one execution provider. Not for several threads at a time.

    `tap` gives for each graph the one to open in its place, whose further values are in `tapped` after each run.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        tap: Callable[[GraphRecord], Tap] | None = None,
    ) -> None:
        check_requirements(bundle.manifest.requires)
        if provider not in PROVIDERS:
            raise InputError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}.")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}, expected a whole number of at least 1.")
        check_stages(bundle)
        # corral's own kernels copy no weights: they read them where the file is mapped.
        mapped = LIBRARY not in bundle.manifest.requires and not _fits(bundle)
        self._graphs = [
            OnnxRuntimeGraph(
                bundle,
                record,
                provider=provider,
                threads=threads or usable_cores(),
                mapped=mapped,
                tap=tap(record) if tap else None,
            )
            for record in bundle.manifest.graphs
        ]

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def run(self, step: Step) -> Float32:
        hidden = step.embeddings_BSH
        for graph in self._graphs:
            hidden = graph.run(step, hidden)
        return hidden

    @property
    def tapped(self) -> dict[str, NDArray[Any]]:
        """The values that `tap` asked for, of the last run, by name."""
        return {name: value for graph in self._graphs for name, value in graph.tapped.items()}

    def release(self) -> None:
        for graph in self._graphs:
            graph.release()


def _fits(bundle: Bundle) -> bool:
    """Whether a packed copy of all weights fits into memory; says so where it does not."""
    weights = sum(record.bytes for record in bundle.manifest.coverage if record.kind != "embedding")
    memory = usable_memory()
    if weights <= WEIGHTS_SHARE * memory:
        return True
    log.warning(
        "%s has %.1f GB of weights, and %.1f GB of memory are free: they stay in the file, and every token takes many "
        "times longer.",
        bundle.directory,
        weights / 1e9,
        memory / 1e9,
    )
    return False
