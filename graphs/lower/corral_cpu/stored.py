"""A quantized weight in the layout of corral's CPU kernels: codes, scales and zero points in tiles of 16 outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.quantized_weight import QuantizedWeight
from corral.spec.cpu_ops import DOMAIN, TILE_OUTPUTS, VERSION
from corral.spec.errors import InputError
from corral.spec.weight_plan import step


def import_kernels(work: ModelAndPlan) -> None:
    """Declare the kernels' domain in the graph's opset imports."""
    work.model.opset_imports[DOMAIN] = VERSION


def store_tiles(work: ModelAndPlan, weight: QuantizedWeight) -> list[ir.Value]:
    """Store [..., inputs, outputs] as codes [..., tiles, 2 * bits * inputs] and fp16 scales [..., tiles, groups, 16]; where
    codes are asymmetric, there are zero points [..., tiles, groups, 8], in pairs.

    Raises InputError where the outputs are not whole tiles.
    """
    *experts, inputs, outputs = weight.codes.shape
    if outputs % TILE_OUTPUTS:
        raise InputError(
            f"{weight.codes.weight} has {outputs} outputs; corral's CPU kernels take multiples of {TILE_OUTPUTS}. "
            "Use --kernels stock."
        )
    tiles, groups = outputs // TILE_OUTPUTS, inputs // weight.group_size
    codes = dataclasses.replace(
        weight.codes.with_layout(step("tile_codes", bits=weight.bits)),
        dtype="uint8",
        shape=(*experts, tiles, 2 * weight.bits * inputs),
        cut="rows",
        cut_multiple=TILE_OUTPUTS,
    )
    scales = dataclasses.replace(
        weight.scales.with_layout(step("tile_scales")),
        dtype="float16",
        shape=(*experts, tiles, groups, TILE_OUTPUTS),
        cut="rows",
        cut_multiple=TILE_OUTPUTS,
    )
    zeros = weight.zeros and dataclasses.replace(
        weight.zeros.with_layout(step("tile_zeros")),
        dtype="uint8",
        shape=(*experts, tiles, groups, TILE_OUTPUTS // 2),
        cut="rows",
        cut_multiple=TILE_OUTPUTS,
    )
    return weight.store(work, codes, scales, zeros)


def two_matrices(first: Sequence[ir.Value | None], second: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """The inputs of an operator with two matrices, as `store_tiles` gives them: zero points come last, in either's place."""
    zeros = [stored[2] if len(stored) > 2 else None for stored in (first, second)]
    return [*first[:2], *second[:2], *(zeros if any(zeros) else [])]
