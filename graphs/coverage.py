"""How every weight of a plan is stored, by kind: the table that shows that nothing was left in float by accident."""

from __future__ import annotations

from corral.graphs.quantize.kinds import KINDS, kind_of
from corral.spec.manifest import CoverageRecord
from corral.spec.quant_scheme import in_words
from corral.spec.weight_plan import Entry, WeightPlan


def coverage(plan: WeightPlan) -> tuple[CoverageRecord, ...]:
    """One record per kind of weight, way of storing it and way it was published, in the order of `KINDS`."""
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in plan:
        rows.setdefault((kind_of(entry.weight).name, stored_as(entry), entry.published), []).append(entry)
    order = [kind.name for kind in KINDS]
    return tuple(
        CoverageRecord(
            kind=kind,
            stored=stored,
            published=published,
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
        if step.output:  # a quantizer; codes and scales of one weight are the same row
            args = dict(step.args)
            if step.name == "e4m3":
                return in_words("fp8", 0)
            return in_words(f"int{args['bits']}", int(args["group_size"]))
    return entry.dtype
