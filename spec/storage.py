"""Bytes of a model's weights by kind, from formulas alone; tests hold them equal to the exact plan where one exists."""

from __future__ import annotations

from collections.abc import Mapping

from corral.spec.errors import InputError
from corral.spec.weight_plan import ITEM_BITS

# How matrices may be stored -> bits of a code, and whether groups of inputs share a float32 scale. fp8 has one scale an
# output, which is not counted (less than 0.1 %), FP4 one of 8 bits for each 16 or 32 inputs, which is. Some of these are
# planned for GPUs and not compiled yet.
WEIGHT_BITS = {
    "fp32": (32, False), "fp16": (16, False), "bf16": (16, False), "fp8": (8, False), "int8": (8, True), "int4": (4, True),
    "int3": (3, True), "int2": (2, True), "w4a8": (4, True), "nvfp4": (4.5, False), "mxfp4": (4.25, False),
}  # fmt: skip
IN_FLOAT32 = ("router", "norm")


def stored_bytes(parameters: Mapping[str, int], weights: str, group_size: int, dtype: str) -> dict[str, int]:
    """Kind of weight -> bytes. The embedding keeps the checkpoint's `dtype`; routers and norms are float32."""
    if weights not in WEIGHT_BITS:
        raise InputError(f'weights "{weights[:80]}" are not known; expected one of {", ".join(WEIGHT_BITS)}.')
    bits, scaled = WEIGHT_BITS[weights]
    matrix = bits + (32 / group_size if scaled else 0)
    kept = dict.fromkeys(IN_FLOAT32, 32.0) | {"embedding": float(ITEM_BITS[dtype])}
    return {kind: int(count * kept.get(kind, matrix)) // 8 for kind, count in parameters.items()}
