"""How every weight of a plan is stored, by kind: the table that shows that nothing was left in float by accident."""

from __future__ import annotations

from corral.graphs.quantize.kinds import KINDS, kind_of
from corral.graphs.quantize.methods import CALIBRATED_STEPS
from corral.spec.manifest import CalibrationRecord, CoverageRecord
from corral.spec.quant_scheme import in_words
from corral.spec.weight_plan import Entry, WeightPlan

FP8_STEPS = ("e4m3", "input_scale")


def coverage(plan: WeightPlan, calibration: CalibrationRecord | None = None) -> tuple[CoverageRecord, ...]:
    """One record per kind of weight, way of storing it and way it was published, in the order of `KINDS`."""
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    fell_back = {(fallback.weight, fallback.expert) for fallback in calibration.fallbacks} if calibration else set()
    for entry in plan:
        rows.setdefault((kind_of(entry.weight).name, stored_as(entry), entry.published), []).append(entry)
    order = [kind.name for kind in KINDS]
    return tuple(
        CoverageRecord(
            kind=kind,
            stored=stored,
            published=published,
            fallbacks=sum(_expert(entry, i) in fell_back for entry in entries for i in range(len(entry.pieces))),
            matrices=sum(len(entry.pieces) for entry in entries if entry.parameters),
            parameters=sum(entry.parameters for entry in entries),
            bytes=sum(entry.nbytes for entry in entries),
        )
        for (kind, stored, published), entries in sorted(
            rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1:])
        )
    )


def stored_as(entry: Entry) -> str:
    """A weight's storage in words: "int4 g128" or its element type."""
    for step in entry.steps:
        if step.name in FP8_STEPS:
            return in_words("fp8", 0)
        if step.output:  # a quantizer; codes and scales of one weight are the same row
            args = dict(step.args)
            method = "" if step.name in ("rtn", "as_published") else f" {step.name.replace('_', '-')}"
            asymmetric = bool(args.get("asymmetric", False))
            return in_words(f"int{args['bits']}", int(args["group_size"]), asymmetric) + method
    return entry.dtype


def _expert(entry: Entry, piece: int) -> tuple[str, int] | None:
    """Whose matrix a piece is, in the words of a calibration's fallbacks; None where it was not calibrated."""
    calibrated = entry.parameters and any(step.name in CALIBRATED_STEPS for step in entry.steps)
    return (entry.weight.rpartition(".")[0], piece) if calibrated else None
