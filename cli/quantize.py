"""`corral quantize`: the second stage of `compile` by itself, on a bundle at stage "exported"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corral.cli.options import chosen_recipe, fresh_option, json_option, out_option, recipe_options


@click.command("quantize")
@click.argument("bundle", type=click.Path(path_type=Path))
@out_option
@recipe_options
@fresh_option
@json_option
def command(bundle: Path, out: Path, recipe_file: Path | None, fresh: bool, as_json: bool, **options: Any) -> None:
    """Stage 2 of compile: decide how each weight of an exported BUNDLE is stored."""
    recipe = chosen_recipe(recipe_file, options)
    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress

    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.graphs.stages import quantize_stage

        written = quantize_stage(bundle, out, recipe, fresh=fresh, progress=progress)
    show_written(written, as_json=as_json)
