"""A Session over a bundle's graphs on ONNX Runtime's CUDA provider: weights and caches stay on the GPU.

ONNX Runtime copies a step's small inputs there and its logits back. The caches are corral's own device memory, bound in
place as past and present, of `max_context` rows (or a chunk) for each sequence.

**Never executed on a GPU.** Tests run this file on the CPU provider, with host memory in the place of the device's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from corral.runtime.gpu.cuda_device import CudaDevice, Device
from corral.runtime.gpu.device_kv_cache import Address, DeviceKvCache
from corral.runtime.onnxruntime_graph import PROVIDERS, OnnxRuntimeGraph, import_onnxruntime
from corral.runtime.onnxruntime_session import check_threads
from corral.runtime.requirements import check_requirements
from corral.runtime.session import Float32, Step
from corral.runtime.stage_io import check_stages
from corral.spec.bundle import Bundle
from corral.spec.errors import EnvironmentProblem
from corral.spec.kv_layout import KvLayout
from corral.spec.machine import usable_cores
from corral.spec.manifest import GraphRecord

PIP = 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"'
MOST_SLOTS = 1 << 16  # more than any GPU has room for


class OnnxRuntimeCudaSession:
    """Runs a bundle's graphs, one stage after the other, on one GPU. Not for several threads at a time.

    `provider` is what computes in place of CUDA in tests; "cpu" takes a device's addresses for those of host memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        open_device: Callable[[], Device] = CudaDevice,
        provider: str = "cuda",
    ) -> None:
        check_threads(threads)
        check_stages(bundle)
        self._device = open_device()  # first: without a GPU no package helps
        if provider == "cuda":
            _check_provider()
            check_requirements(bundle.manifest.requires)
        self._graphs = [
            _DeviceGraph(bundle, record, provider=provider, threads=threads or usable_cores())
            for record in bundle.manifest.graphs
        ]

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> DeviceKvCache:
        fixed = [dataclasses.replace(layout, fixed_rows=layout.capacity(max_context)) for layout in layouts]
        for graph in self._graphs:
            graph.rows = {layer: layout.capacity(max_context) for layout in fixed for layer in layout.layers}
        return DeviceKvCache(self._device, fixed, MOST_SLOTS)

    def run(self, step: Step) -> Float32:
        self._device.wait()  # caches are moved and wiped on a stream of corral's; ONNX Runtime has its own
        hidden = step.embeddings_BSH
        for graph in self._graphs:
            hidden = graph.run(step, hidden)
        return hidden

    def release(self) -> None:
        for graph in self._graphs:
            graph.release()


class _DeviceGraph(OnnxRuntimeGraph):
    """Its caches are addresses on the device."""

    reads_bound_memory = False  # ONNX Runtime copies inputs to the device when they are bound

    def __init__(self, bundle: Bundle, record: GraphRecord, *, provider: str, threads: int) -> None:
        super().__init__(bundle, record, provider=provider, threads=threads, mapped=False)
        self._on = provider
        self._layouts = {layer: layout for layout in bundle.manifest.kv for layer in layout.layers}
        self.rows: dict[int, int] = {}  # of each layer's caches
        active = self._session.get_providers()[0]
        if active != PROVIDERS[provider][0]:
            raise EnvironmentProblem(
                f"ONNX Runtime {self._ort.__version__} did not start its CUDA provider and would run on {active}; most "
                f"likely CUDA's libraries are missing. Run `{PIP}`."
            )

    def _bind_cache(self, layer: int, past: str, present: str, rows: Address, batch: int) -> None:
        layout = self._layouts[layer]
        shape = (batch, layout.num_heads, self.rows[layer], layout.head_dim)
        place: tuple[Any, ...] = (self._on, 0, np.dtype(layout.dtype).type, shape, rows)
        self._binding.bind_input(past, *place)
        self._binding.bind_output(present, *place)


def _check_provider() -> None:
    """Raise EnvironmentProblem unless this ONNX Runtime has the CUDA provider; load the libraries that it needs."""
    ort = import_onnxruntime()
    if PROVIDERS["cuda"][0] not in ort.get_available_providers():
        raise EnvironmentProblem(
            f"ONNX Runtime {ort.__version__} here has no CUDA provider. Run `pip uninstall onnxruntime`, then `{PIP}`: "
            "the two packages overwrite each other."
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints; what is missing shows when the provider starts
        ort.preload_dlls()
