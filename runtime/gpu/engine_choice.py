"""Which of a bundle's engines run on the GPU that is here: one for each stage, by compute capability."""

from __future__ import annotations

from corral.runtime.gpu.cuda_device import Device
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.manifest import EngineRecord
from corral.spec.target import check_capability, target_named


def choose_engines(bundle: Bundle, device: Device) -> list[EngineRecord]:
    """One engine for each of the manifest's graphs, in their order. Raises InputError where there is none."""
    chosen = []
    for graph in bundle.manifest.graphs:
        engines = [engine for engine in bundle.manifest.engines if engine.graph == graph.path]
        fitting = [engine for engine in engines if device.capability in engine.capabilities]
        if not fitting:
            there = sorted({capability for engine in engines for capability in engine.capabilities}, key=float)
            raise InputError(
                f"{bundle.directory} holds engines of {graph.path} for compute capability {', '.join(there) or 'none'}, "
                f"and {device.name} has {device.capability}. {_remedy(bundle, device.capability)}"
            )
        chosen.append(fitting[0])
    return chosen


def _remedy(bundle: Bundle, capability: str) -> str:
    recipe = bundle.manifest.recipe
    try:
        for scheme in recipe.schemes:
            check_capability(target_named(recipe.target), capability, scheme)
    except InputError as error:
        return f"Building one will not help: {error}"
    return f"Run `corral build {bundle.directory} --gpu {capability}`; it adds one beside those."
