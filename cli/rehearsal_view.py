"""What `corral compile --discard` prints at its end: what would have been written, and how fast it was computed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from corral.cli.formats import count, seconds, size
from corral.cli.tables import Table, print_json, print_table

if TYPE_CHECKING:
    from corral.graphs.rehearsal import Rehearsal


def show_rehearsal(rehearsal: Rehearsal, *, as_json: bool) -> None:
    """Print a table of the shards' digests and a line of totals, or all of it as JSON."""
    if as_json:
        print_json({**dataclasses.asdict(rehearsal), "bytes": rehearsal.bytes})
        return
    rows = [(shard.name, size(shard.bytes), shard.sha256) for shard in rehearsal.shards]
    print_table(Table(columns=("shard", "size>", "digest"), rows=rows))
    parameters, took = rehearsal.parameters, rehearsal.seconds
    click.echo(
        f"\n   {count(parameters)} parameters as {size(rehearsal.bytes)} in {seconds(took)}: "
        f"{count(parameters / took)} parameters/s, {size(rehearsal.bytes / took)}/s; nothing was written"
    )
