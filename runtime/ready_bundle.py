"""A bundle that can run: opened, how long its sequences may be, and what computes it."""

from __future__ import annotations

from pathlib import Path

from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import Session
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.cpu_ops import attends
from corral.spec.errors import InputError
from corral.spec.manifest import Manifest
from corral.spec.progress import Progress
from corral.spec.target import target_named

# Caches grow with use, so the limit costs nothing; it is there because a forgotten 10 M tokens would.
DEFAULT_CONTEXT = 131072

NEXT_STAGE = {
    "exported": "Run `corral quantize`, then `corral lower`",
    "quantized": "Run `corral lower` on it",
    "lowered": "Run `corral build` on it",
}


def open_ready(path: str | Path | Bundle, verify: bool, progress: Progress) -> Bundle:
    """Raises InputError for what is no bundle, and for a bundle that is not ready to run."""
    bundle = path if isinstance(path, Bundle) else open_bundle(path, verify=verify, progress=progress)
    if bundle.manifest.stage != "ready":
        raise InputError(
            f'{bundle.directory} is at stage "{bundle.manifest.stage}", expected "ready": it cannot run yet. '
            f"{NEXT_STAGE[bundle.manifest.stage]}, or `corral compile` on the checkpoint."
        )
    return bundle


def longest_context(manifest: Manifest) -> tuple[int, str]:
    """The most tokens of a sequence, and why it is these."""
    most = manifest.model.max_position_embeddings
    if manifest.engines and manifest.recipe.max_context < most:
        return manifest.recipe.max_context, "which its engines were built for (--max-context of `corral compile`)"
    return most, "which the model was made for"


def chosen_context(manifest: Manifest, max_context: int | None) -> int:
    """What was asked for, or the default. Raises InputError where the bundle cannot do it."""
    most, why = longest_context(manifest)
    if max_context is None:
        return min(most, DEFAULT_CONTEXT)
    if isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 <= max_context <= most:
        raise InputError(f"max_context is {max_context!r}, expected 1 to {most} tokens, {why}.")
    return max_context


def wide_batches(manifest: Manifest) -> bool:
    """Whether a step may have several sequences of several tokens each, all with a past."""
    attends_itself = manifest.recipe.kernels == "corral" and attends(manifest.model.head_dim)
    return attends_itself or target_named(manifest.recipe.target).wide_batches


def open_session(bundle: Bundle, provider: str, threads: int | None) -> Session:
    """The GPU that the bundle's engines are for, or ONNX Runtime on what its target is for.

    Raises InputError for a provider or number of threads that cannot be, EnvironmentProblem for what is not installed.
    """
    if bundle.manifest.engines:
        from corral.runtime.gpu.tensorrt_session import TensorRTSession

        return TensorRTSession(bundle)
    if target_named(bundle.manifest.recipe.target).provider == "cuda":
        from corral.runtime.gpu.onnxruntime_cuda_session import OnnxRuntimeCudaSession

        return OnnxRuntimeCudaSession(bundle, threads=threads)
    return OnnxRuntimeSession(bundle, provider=provider, threads=threads)
