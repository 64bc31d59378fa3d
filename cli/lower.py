"""`corral lower`: the last stage of `compile` by itself, on a bundle at stage "quantized"."""

from __future__ import annotations

from pathlib import Path

import click

from corral.cli.options import RECIPE_HELP, fresh_option, jobs_option, json_option, out_option, ray_option


@click.command("lower")
@click.argument("bundle", type=click.Path(path_type=Path))
@out_option
@click.option("--target", help=f"{RECIPE_HELP['target']}  [default: as given to quantize]")
@jobs_option
@ray_option
@fresh_option
@json_option
def command(
    bundle: Path, out: Path, target: str | None, jobs: int | None, ray: str | None, fresh: bool, as_json: bool
) -> None:
    """Stage 3 of compile: bring a quantized BUNDLE to its target and compute its weights."""
    import dataclasses

    from corral.cli.bundle_view import show_written
    from corral.cli.progress import show_progress
    from corral.spec.manifest import read_manifest

    recipe = read_manifest(bundle).recipe
    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.graphs.stages import lower_stage

        recipe = dataclasses.replace(recipe, target=target or recipe.target)
        written = lower_stage(bundle, out, recipe, fresh=fresh, jobs=jobs, ray=ray, progress=progress)
    show_written(written, as_json=as_json)
