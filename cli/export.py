"""`corral export`: the first stage of `compile` by itself, checkpoint -> graph and weight plan."""

from __future__ import annotations

from pathlib import Path

import click

from corral.cli.options import fresh_option, json_option, layers_option, out_option, part_of


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@out_option
@layers_option
@fresh_option
@json_option
def command(checkpoint: Path, out: Path, layers: str | None, fresh: bool, as_json: bool) -> None:
    """Stage 1 of compile: capture a CHECKPOINT's graph and plan its weights, reading none."""
    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress

    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.graphs.stages import export_stage

        bundle = export_stage(part_of(checkpoint, layers), out, fresh=fresh, progress=progress)
    show_written(bundle, as_json=as_json)
