"""Where a bundle will run and what that can do: one table."""

from __future__ import annotations

from dataclasses import dataclass

from corral.spec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place to run. `weights` names the schemes its lowering supports; `requires` the packages of the runtime."""

    name: str
    description: str
    weights: tuple[str, ...]
    requires: tuple[tuple[str, str], ...]  # (distribution, minimum version)
    opset: int  # of the default ONNX domain
    kernels: tuple[str, ...] = ("stock",)  # "stock": the backend's own; "corral": also corral's CPU kernels, for int4


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="portable",
            description="standard ONNX operators only: any ONNX backend, and the oracle for every other target",
            weights=("fp32", "int8", "int4"),
            requires=(("onnxruntime", "1.31"),),
            opset=24,
        ),
        Target(
            name="cpu",
            description="ONNX Runtime's CPU kernels: QMoE, MatMulNBits, GroupQueryAttention on shared caches",
            weights=("fp32", "int8", "int4"),
            requires=(("onnxruntime", "1.31"),),
            opset=24,
            kernels=("stock", "corral"),
        ),
    )
}


def target_named(name: str) -> Target:
    """Look a target up. Raises InputError naming those there are."""
    if name not in TARGETS:
        raise InputError(f'target "{name}" is not known; expected one of {", ".join(TARGETS)}.')
    return TARGETS[name]
