"""`corral compile`: checkpoint -> bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corral.cli.options import chosen_recipe, fresh_option, jobs_option, json_option, out_option, recipe_options


@click.command("compile")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@out_option
@recipe_options
@jobs_option
@fresh_option
@json_option
def command(
    checkpoint: Path,
    out: Path,
    recipe_file: Path | None,
    jobs: int | None,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile a CHECKPOINT, a directory or OWNER/NAME on the Hub, into a bundle that runs without it."""
    recipe = chosen_recipe(recipe_file, options)
    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress

    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.graphs import compile

        bundle = compile(checkpoint, out, recipe, fresh=fresh, jobs=jobs, progress=progress)
    show_written(bundle, as_json=as_json)
