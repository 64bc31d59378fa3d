"""Where a bundle will run and what that can do: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from corral.spec import cpu_ops
from corral.spec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place to run. `weights` names the schemes that the backend's own kernels take, `corral_weights` those that
    corral's CPU kernels take there; `requires` the packages of the runtime.

    A target with an `engine` compiles its graph once more, into engines for the compute capabilities of
    `capabilities`, each with the schemes that such a device takes.
    """

    name: str
    description: str
    weights: tuple[str, ...]
    requires: tuple[tuple[str, str], ...]  # (distribution, minimum version)
    opset: int  # of the default ONNX domain
    corral_weights: tuple[str, ...] = ()
    kv_dtype: str = "float32"  # of the caches
    zero_points: bool = False  # whether its lowering takes asymmetric codes
    wide_batches: bool = False  # whether a step may have several sequences of several tokens each, with a past
    provider: str = "cpu"  # of ONNX Runtime, which runs it unless there is an engine
    engine: str | None = None  # the module that builds
    capabilities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Weights and caches that it does not take -> why, and what to do.
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """What a recipe may name to compute quantized weights -> the schemes that it takes."""
        return {"stock": self.weights} | ({"corral": self.corral_weights} if self.corral_weights else {})

    @property
    def all_weights(self) -> tuple[str, ...]:
        """Every scheme that some of its kernels take."""
        return tuple(dict.fromkeys(scheme for schemes in self.kernels.values() for scheme in schemes))


# What TensorRT for RTX 1.7 builds for, as tried: 7.5 refuses int4 and float32 matrix products, 9.0 and 10.x it lacks.
RTX_CAPABILITIES = {
    "8.0": ("fp16", "int4"),
    "8.6": ("fp16", "int4"),
    "8.9": ("fp16", "int4", "fp8", "w4a8"),
    "12.0": ("fp16", "int4", "fp8", "w4a8", "nvfp4"),
}
# What NVIDIA's support matrix says of TensorRT 11. Nothing of it was tried: it needs a GPU to build.
TENSORRT_CAPABILITIES = RTX_CAPABILITIES | {
    "9.0": ("fp16", "int4", "fp8", "w4a8"),
    "10.0": ("fp16", "int4", "fp8", "w4a8", "nvfp4"),
}
# What TensorRT for RTX 1.7.1 refuses, in its words.
REFUSED = {
    "fp8 caches": ' TensorRT writes caches by TensorScatter, which refuses FP8 ("cache has type FP8 but must have type Float, '
    'Half, or BFloat16"). Use --kv float, which is float16 there.',
    "mxfp4": ' TensorRT imports no scales of type E8M0 ("ONNX initializer … cannot be imported into TensorRT!"). Use nvfp4, '
    "or target portable, which emulates mxfp4.",
}
# What onnxruntime-gpu 1.31.1 holds code for: read from its library, nothing of it tried.
CUDA_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "12.0")


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="portable",
            description="standard ONNX operators only: any ONNX backend, and the oracle for every other target",
            weights=("fp32", "int8", "int4", "nvfp4", "mxfp4"),
            requires=(("onnxruntime", "1.31"),),
            opset=24,
            zero_points=True,
            wide_batches=True,
        ),
        Target(
            name="cpu",
            description="ONNX Runtime's CPU kernels: QMoE, MatMulNBits, GroupQueryAttention on shared caches",
            weights=("fp32", "int8", "int4"),
            corral_weights=cpu_ops.WEIGHTS,
            requires=(("onnxruntime", "1.31"),),
            opset=24,
            zero_points=True,
        ),
        Target(
            name="cuda",
            description="ONNX Runtime's CUDA kernels: QMoE, MatMulNBits, GroupQueryAttention in 16 bits",
            weights=("int4",),
            requires=(("onnxruntime-gpu", "1.31"), ("cuda-bindings", "13.0")),
            opset=24,
            kv_dtype="float16",
            provider="cuda",
        ),
        Target(
            name="tensorrt-rtx",
            description="engines of TensorRT for RTX, built without a GPU",
            weights=("fp16", "int4", "fp8", "w4a8", "nvfp4"),
            requires=(("tensorrt-rtx-cu13", "1.7.1"),),
            opset=24,
            kv_dtype="float16",
            engine="tensorrt_rtx",
            capabilities=RTX_CAPABILITIES,
            refused=REFUSED,
        ),
        Target(
            name="tensorrt",
            description="engines of TensorRT, built on the GPU that they are for",
            weights=("fp16", "int4", "fp8", "w4a8", "nvfp4"),
            requires=(("tensorrt", "11.0"),),
            opset=24,
            kv_dtype="float16",
            engine="tensorrt",
            capabilities=TENSORRT_CAPABILITIES,
            refused=REFUSED,
        ),
    )
}


def target_named(name: str) -> Target:
    """Look a target up. Raises InputError naming those there are."""
    if name not in TARGETS:
        raise InputError(f'target "{name}" is not known; expected one of {", ".join(TARGETS)}.')
    return TARGETS[name]


def check_capability(target: Target, capability: str, weights: str) -> None:
    """Raise InputError, with a remedy, unless engines of `target` with such weights exist for a compute capability."""
    if not target.engine:
        builders = ", ".join(other.name for other in TARGETS.values() if other.engine)
        raise InputError(
            f"target {target.name} builds no engines, so it takes no --gpu ({capability}). "
            f"Leave --gpu out, or choose a target that builds engines: {builders}."
        )
    if capability not in target.capabilities:
        others = [other.name for other in TARGETS.values() if capability in other.capabilities]
        others += ["cuda (without --gpu: it has no engines)"] if capability in CUDA_CAPABILITIES else []
        remedy = f"Use --target {' or '.join(others)} for it." if others else "No target of this version does."
        raise InputError(
            f"target {target.name} builds no engines for compute capability {capability}; "
            f"it builds for {', '.join(target.capabilities)}. {remedy}"
        )
    if weights not in target.capabilities[capability]:
        able = [other for other, schemes in target.capabilities.items() if weights in schemes]
        raise InputError(
            f"compute capability {capability} has no {weights} weights in target {target.name}; it takes "
            f"{', '.join(target.capabilities[capability])}, and {weights} needs one of {', '.join(able)}. "
            f"Choose another --weights or another --gpu."
        )
