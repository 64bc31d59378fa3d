"""How many bytes of each engine's weights stay on the GPU, where engines were built so that the rest may stream to it.

TensorRT reads what does not stay from the host's memory in every step, which is slower by as much as PCIe is slower than
the GPU's memory. Computed, not measured: no engine has run yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral.runtime.gpu.cuda_device import Device
from corral.spec.bundle import Bundle
from corral.spec.manifest import EngineRecord

# Assumed: what execution contexts take besides, and streaming's own buffers.
HEADROOM_BYTES = 1 << 30


def weight_budgets(
    bundle: Bundle, engines: Sequence[EngineRecord], device: Device, cache_bytes: int
) -> list[int | None]:
    """A budget for each engine, None where its weights do not stream: what the caches leave, shared by the engines' sizes."""
    if not bundle.manifest.recipe.weight_streaming:
        return [None] * len(engines)
    sizes = [bundle.path(engine.path).stat().st_size for engine in engines]
    room = max(device.free_memory() - cache_bytes - HEADROOM_BYTES, 0)
    return [size if sum(sizes) <= room else size * room // sum(sizes) for size in sizes]
