"""`corral tune`: a recipe with the bits, group size and method that each matrix deserves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from corral.cli.options import RECIPE_HELP, json_option, layers_option, part_of, threads_option
from corral.cli.written_file import check_place, write_named
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DEFAULTS = Recipe()


@click.command("tune")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Recipe file to write.")
@click.option("--budget", metavar="NATS-kl", help="As small as it gets with at most this divergence: 0.01-kl.")
@click.option("--size", metavar="BYTES", help="As little divergence as fits in a bundle of this size: 9.5MB, 60GB.")
@click.option(
    "--tokens-per-second", type=float, help="As little divergence as this decode speed allows, on this machine."
)
@click.option("--target", default=DEFAULTS.target, show_default=True, help=RECIPE_HELP["target"])
@click.option("--kernels", default=DEFAULTS.kernels, show_default=True, help=RECIPE_HELP["kernels"])
@click.option("--calibration", default=DEFAULTS.calibration, show_default=True, help=RECIPE_HELP["calibration"])
@click.option(
    "--calibration-tokens",
    type=int,
    default=DEFAULTS.calibration_tokens,
    show_default=True,
    help="Calibrate on so many.",
)
@click.option("--tokens", type=int, default=8192, show_default=True, help="Measure on so many after those.")
@layers_option
@threads_option
@json_option
def command(
    checkpoint: Path,
    out: Path,
    budget: str | None,
    size: str | None,
    tokens_per_second: float | None,
    tokens: int,
    layers: str | None,
    threads: int | None,
    as_json: bool,
    **recipe: str | int,
) -> None:
    """Choose bits, group size and method of every matrix of a CHECKPOINT, and write a recipe for `corral compile --recipe`.

    Each matrix's sensitivity is measured, in as many passes through the model as there are ways to store them.
    """
    wanted = _budget(budget, size, tokens_per_second)
    if tokens < 1:
        raise InputError(f"tokens is {tokens}, expected at least 1.")
    check_place(out, "--out")
    if out.exists():
        raise InputError(f"{out} is there already; expected the name of a new recipe file, such as tuned.toml.")
    chosen = Recipe.from_json(dict(recipe), where="options")
    from corral.cli.progress import show_progress
    from corral.cli.tables import print_json
    from corral.cli.tune_view import show_tuned, written

    with show_progress() as progress:
        progress("load compiler", 0, 0, "")  # torch takes seconds
        from corral.tune.tune import tune
        from corral.tune.tuned import Budget

        tuned = tune(
            part_of(checkpoint, layers), Budget(**wanted), chosen, tokens=tokens, threads=threads, progress=progress
        )
    write_named(out, "--out", written(tuned).encode(), "a recipe")
    if as_json:
        print_json(tuned.to_json())
    else:
        show_tuned(tuned, checkpoint, out)


def _budget(budget: str | None, size: str | None, tokens_per_second: float | None) -> dict[str, Any]:
    """The one budget that is given, as the fields of a `Budget`."""
    given = [
        name
        for name, value in (("--budget", budget), ("--size", size), ("--tokens-per-second", tokens_per_second))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError(
            f"expected one of --budget NATS-kl, --size BYTES and --tokens-per-second N, got {' and '.join(given) or 'none'}."
        )
    if budget is not None:
        return {"what": "kl", "limit": _number(budget, "--budget", {"-kl": 1}, "0.01-kl")}
    if size is not None:
        return {"what": "size", "limit": _number(size, "--size", UNITS, "9.5MB or 60GB")}
    assert tokens_per_second is not None
    return {"what": "tokens-per-second", "limit": _number(str(tokens_per_second), "--tokens-per-second", {"": 1}, "20")}


def _number(text: str, option: str, units: Mapping[str, int], example: str) -> float:
    """A positive number with one of `units` behind it."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?) ?(\D*)", text.strip())
    if found is None or found[2] not in units or not 0 < (value := float(found[1]) * units[found[2]]) < math.inf:
        raise InputError(f'{option} is "{text[:80]}", expected a number above 0 with its unit, such as {example}.')
    return value
