"""A bundle's weight plan for people: each stored tensor, the steps that made it, and what they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import click

from corral.cli.formats import size
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.weight_plan import Entry, Placement, Source, WeightPlan

PLAN_FILE = "plan.json"
MOST_PIECES = 4  # of an entry, before "and 12 more"; --json has them all


def plan_view(bundle: Bundle, name: str | None) -> tuple[Any, Callable[[], None]]:
    """The plan's entries whose name (or weight) fits `name`, as JSON and as a function that prints them."""
    plan = _read_plan(bundle)
    placements = plan.placements()
    chosen = [entry for entry in plan if name is None or _fits(entry, name)]
    if not chosen:
        some = ", ".join(list(plan.entries)[:5])
        raise InputError(f'the plan of {bundle.directory} has no tensor "{name}"; it has {some}, … Try "*{name}*".')
    data = [
        {**item, "shard": placements[item["name"]].shard, "offset": placements[item["name"]].offset}
        for item in WeightPlan({entry.name: entry for entry in chosen}).to_json()
    ]

    def show() -> None:
        for entry in chosen:
            click.echo(describe(entry, placements[entry.name]))

    return data, show


def describe(entry: Entry, placement: Placement) -> str:
    """One entry in a few lines: what is stored where, then its steps, then its sources."""
    where = f"shard {placement.shard}, offset {placement.offset:,}"
    pieces = [f"      <- {_source(piece)}" for piece in entry.pieces[:MOST_PIECES]]
    if more := len(entry.pieces) - MOST_PIECES:
        pieces += [f"         and {more} more"] if more > 0 else []
    return "\n".join(
        [
            f"   {entry.name}  {entry.dtype} {list(entry.shape)}  {size(entry.nbytes)}  {where}",
            f"      <- {', then '.join(map(str, entry.steps)) or 'as it is'}",
            *pieces,
        ]
    )


def _source(source: Source) -> str:
    cuts = [
        f"{axis} {cut[0]} to {cut[1] - 1}"
        for axis, cut in (("rows", source.rows), ("columns", source.columns))
        if cut is not None
    ]
    expert = [] if source.index is None else [f"[{source.index}]"]
    return " ".join([source.tensor, *expert, *(["transposed"] if source.transposed else []), *cuts])


def _fits(entry: Entry, name: str) -> bool:
    return fnmatchcase(entry.name, name) or fnmatchcase(entry.weight, name)


def _read_plan(bundle: Bundle) -> WeightPlan:
    path = bundle.path(PLAN_FILE)
    try:
        return WeightPlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{bundle.directory} has no {PLAN_FILE}. Compile the checkpoint again.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a readable plan: {type(error).__name__}: {error}. Compile the checkpoint again."
        ) from None
