"""Engines as a page: every kernel in order, layer by layer. Its script only filters what is there already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from corral.cli.engine_report import EngineReport, ProfileReport, Sidecars
from corral.cli.formats import TIMES, counted, size
from corral.cli.page import render_page
from corral.spec.gpus import GPUS

if TYPE_CHECKING:
    from corral.graphs.engine.schedule import Kernel, Operand
    from corral.spec.bundle import Bundle

OPEN_KERNELS = 200  # of a profile: beyond, its layers are folded

# What a kernel is for -> what the legend says of it.
ROLES = {
    "attention": "attention",
    "packed": "matrix product that dequantizes its weights on the way",
    "matrix": "matrix product",
    "unpacked": "writes dequantized weights to memory",
    "other": "everything else",
}
LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Box:
    """One kernel, in the order of the schedule, counted from 1."""

    number: int
    name: str
    kind: str
    role: str
    layers: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """A part of a bar, in percent of it."""

    name: str
    size: str
    start: float
    width: float


@dataclass(frozen=True, kw_only=True)
class ProfilePage:
    """One profile as the template shows it."""

    report: ProfileReport
    boxes: tuple[Box, ...]
    groups: tuple[tuple[str, tuple[Box, ...]], ...]
    roles: Mapping[str, int]
    weights: tuple[Share, ...]
    unfolded: bool


def engine_page(bundle: Bundle, sidecars: Sidecars) -> str:
    """The page of these engines of a bundle."""
    return render_page(
        "engine_page",
        title=bundle.directory.resolve().name,
        manifest=bundle.manifest,
        engines={path: (engine, [_profile(p) for p in engine.profiles]) for path, engine in sidecars.reports.items()},
        caches=_caches(bundle),
        gpus=_gpus,
        roles=ROLES,
        counted=counted,
        written=_written,
        data=sidecars.json,
    )


def _profile(report: ProfileReport) -> ProfilePage:
    unfused = {(kernel.kernel, layer) for kernel in report.unfused_weights for layer in kernel.layers}
    boxes = tuple(
        Box(
            number, kernel.name, kernel.kind, _role(kernel, unfused), kernel.layers, tuple(map(_written, kernel.writes))
        )
        for number, kernel in enumerate(report.kernels, 1)
    )
    groups = tuple((place, tuple(part)) for place, part in groupby(boxes, _place))
    counts = {role: sum(box.role == role for box in boxes) for role in ROLES}
    return ProfilePage(
        report=report,
        boxes=boxes,
        groups=groups,
        roles={role: count for role, count in counts.items() if count},
        weights=_shares(report.weights),
        unfolded=len(boxes) <= OPEN_KERNELS,
    )


def _role(kernel: Kernel, unfused: set[tuple[str, str]]) -> str:
    layers = kernel.layers
    if any((kernel.name, layer) in unfused for layer in layers):
        return "unpacked"
    if any(layer.endswith(".Attention") for layer in layers):
        return "attention"
    if any("MatMul" in layer for layer in layers):
        return "packed" if any(layer.endswith("DequantizeLinear") for layer in layers) else "matrix"
    return "other"


def _place(box: Box) -> str:
    """Where in the decoder a kernel belongs. One at the seam of two layers prepares the input of the later."""
    numbers = {int(match[1]) for layer in box.layers if (match := LAYER.match(layer))}
    if not numbers:
        return "no layer"
    return f"layer {max(numbers)}" if len(numbers) <= 2 else f"layers {min(numbers)} to {max(numbers)}"


def _written(tensor: Operand) -> str:
    """Its sizes, with n for those that only a step decides, and its type."""
    sizes = [str(d) if isinstance(d, int) else "n" for d in tensor.shape]
    return f"{f' {TIMES} '.join(sizes) or 'one'} {tensor.type}"


def _shares(weights: Mapping[str, int]) -> tuple[Share, ...]:
    total, start, shares = sum(weights.values()), 0.0, []
    for kind, count in sorted(weights.items(), key=lambda item: -item[1]):
        width = 100 * count / total if total else 0.0
        shares.append(Share(kind, size(count), start, width))
        start += width
    return tuple(shares)


def _caches(bundle: Bundle) -> Sequence[tuple[str, str]]:
    """Per KV class what it is, and the bytes of one sequence's caches."""
    recipe = bundle.manifest.recipe
    return [
        (
            f"{kv.kv_class}: {counted(len(kv.layers), 'layer')}, {kv.capacity(recipe.max_context):,} rows, {kv.dtype}",
            size(kv.bytes(recipe.max_context)),
        )
        for kv in bundle.manifest.kv
    ]


def _gpus(engine: EngineReport) -> str:
    """The GPUs of corral's list that an engine is for."""
    titles = [gpu.title for gpu in GPUS.values() if gpu.capability in engine.capabilities]
    return ", ".join(titles) or "none of corral's list"
