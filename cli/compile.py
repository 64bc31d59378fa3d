"""`corral compile`: checkpoint -> bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corral.cli.options import (
    chosen_recipe,
    fresh_option,
    jobs_option,
    json_option,
    layers_option,
    part_of,
    ray_option,
    recipe_options,
)
from corral.spec.errors import InputError


@click.command("compile")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory to write; all but --discard need it.")
@recipe_options
@layers_option
@jobs_option
@ray_option
@click.option("--discard", is_flag=True, help="Write nothing: compute every weight and print digests.")
@fresh_option
@json_option
def command(
    checkpoint: Path,
    out: Path | None,
    recipe_file: Path | None,
    layers: str | None,
    jobs: int | None,
    ray: str | None,
    discard: bool,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile a CHECKPOINT, a directory or OWNER/NAME on the Hub, into a bundle that runs without it."""
    if discard == (out is not None):  # a directory that is named and then not written would be looked for
        got = "both" if discard else "neither"
        raise InputError(f"expected -o OUT, or --discard to write nothing; got {got}. Run `corral compile --help`.")
    recipe, checkpoint = chosen_recipe(recipe_file, options), part_of(checkpoint, layers)
    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress
    from corral.cli.rehearsal_view import show_rehearsal

    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.graphs import compile, rehearse

        if out is None:
            rehearsal = rehearse(checkpoint, recipe, jobs=jobs, ray=ray, progress=progress)
        else:
            bundle = compile(checkpoint, out, recipe, fresh=fresh, jobs=jobs, ray=ray, progress=progress)
    if out is None:
        show_rehearsal(rehearsal, as_json=as_json)
    else:
        show_written(bundle, as_json=as_json)
