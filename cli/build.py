"""`corral build`: the engines of a lowered bundle, built into it."""

from __future__ import annotations

from pathlib import Path

import click

from corral.cli.options import RECIPE_HELP, json_option


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gpu", default="", help=f"{RECIPE_HELP['gpu']}  [default: as compiled]")
@click.option("--target", default="", help="Whose module builds them.  [default: as compiled]")
@click.option("--fresh", is_flag=True, help="Build again what is there already.")
@json_option
def command(bundle: Path, gpu: str, target: str, fresh: bool, as_json: bool) -> None:
    """Stage 4 of compile: build the engines of a lowered BUNDLE, into it; needs no GPU for target tensorrt-rtx."""
    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress

    with show_progress() as progress:
        from corral.graphs.engine.engines import build_engines

        written = build_engines(bundle, gpu=gpu, target=target, fresh=fresh, progress=progress)
    show_written(written, as_json=as_json)
