"""`corral demo`: the whole way in five steps, on the small model that lies in the repository."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral.cli.formats import count, seconds
from corral.cli.options import json_option, threads_option
from corral.spec.errors import EnvironmentProblem
from corral.spec.recipe import Recipe

if TYPE_CHECKING:
    from corral.spec.manifest import Manifest
    from corral.spec.progress import Progress

CHECKPOINT = Path("demo") / "demo-scout"
HELD_OUT = "heldout.txt"
RECIPES = tuple(Recipe(target="cpu", weights=weights) for weights in ("fp32", "int8", "int4"))
PROMPT = "def parse_header(line):\n"
COMPLETION_TOKENS = 64


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Directory for the bundles.",
)
@click.option("--tokens", type=int, default=20_000, show_default=True, help="Held-out tokens to validate on.")
@threads_option
@json_option
def command(out: Path, tokens: int, threads: int | None, as_json: bool) -> None:
    """Compile the demo model to fp32, int8 and int4, complete code with it, and measure what that cost."""
    checkpoint = find_checkpoint()
    say = _Steps(quiet=as_json)
    bundles = _compile(checkpoint, out, say)
    _run(bundles[-1], threads, say)
    from corral.cli.report_view import show_report
    from corral.cli.tables import print_json
    from corral.validate import compare
    from corral.validate.windows import read_text

    with say.step("validate") as (told, progress):
        text = read_text(checkpoint / HELD_OUT)
        report = compare(checkpoint, bundles, [text], predictions=tokens, threads=threads, progress=progress)
        told.append(f"on {report.measured.predictions:,} held-out tokens")
    if as_json:
        print_json(report.to_json())
        return
    click.echo()
    show_report(report)
    click.echo(f'\n   next: corral run {bundles[-1]} "import os", or your own: corral compile CHECKPOINT -o OUT')


def find_checkpoint() -> Path:
    """The demo's checkpoint in the repository that this file lies in."""
    checkpoint = Path(__file__).resolve().parents[1] / CHECKPOINT
    if not (checkpoint / HELD_OUT).is_file():
        raise EnvironmentProblem(
            f"the demo model is not here (expected {checkpoint}); it lies in corral's repository and is not installed "
            "with the package. Clone the repository and run `make demo` there, or compile a checkpoint of your own with "
            "`corral compile CHECKPOINT -o OUT`."
        )
    return checkpoint


class _Steps:
    """Numbers the steps, and says each with what came out and how long it took."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self._number = quiet, 0

    @contextmanager
    def step(self, name: str) -> Iterator[tuple[list[str], Progress]]:
        from corral.cli.progress import show_progress

        self._number += 1
        told: list[str] = []
        start = time.perf_counter()
        with show_progress() as progress:
            progress(name, 0, 0, "")
            yield told, progress
        if not self.quiet:
            took = seconds(time.perf_counter() - start)
            click.echo(f"{self._number}  {name:<12}{', '.join(told):<66}{took:>9}")


def _compile(checkpoint: Path, out: Path, say: _Steps) -> list[Path]:
    """One bundle for each of RECIPES, of one export."""
    with say.step("reference") as (told, _):
        from corral.model.checkpoint import open_checkpoint

        source = open_checkpoint(checkpoint)
        config = source.config
        parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
        told += [checkpoint.name, f"{count(parameters)} parameters", f"{config.num_local_experts} experts"]
        told += [f"chunk {config.attention_chunk_size}"]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".stages-") as name:
        stages, bundles = Path(name), []
        from corral.graphs.stages import export_stage, lower_stage, quantize_stage

        with say.step("export") as (told, progress):
            exported = export_stage(checkpoint, stages / "exported", progress=progress).manifest
            nope = sum(not layer.rope for layer in exported.model.layers)
            told += [f"{len(exported.graphs)} graph", f"{exported.model.num_layers - nope} rope and {nope} nope layers"]
        with say.step("quantize") as (told, progress):
            for recipe in RECIPES:
                quantized, bundle = stages / recipe.weights, out / recipe.weights
                quantize_stage(stages / "exported", quantized, recipe, progress=progress)
                manifest = lower_stage(quantized, bundle, recipe, fresh=True, progress=progress).manifest
                bundles.append(bundle)
            told += [", ".join(recipe.weights for recipe in RECIPES), _coverage(manifest)]
    return bundles


def _run(bundle: Path, threads: int | None, say: _Steps) -> None:
    from corral.runtime import LLM, SamplingParams

    with say.step("run") as (told, _):
        completion = LLM(bundle, threads=threads).generate(
            [PROMPT], SamplingParams(max_tokens=COMPLETION_TOKENS, temperature=0.0)
        )[0]
        told.append(f"{len(completion.token_ids)} tokens of {bundle.name}")
    if not say.quiet:
        click.echo("".join(f"      {line}\n" for line in (PROMPT + completion.text).splitlines()), nl=False)


def _coverage(manifest: Manifest) -> str:
    """How many of the parameters are quantized; the rest is norms, routers and the embedding."""
    stored = [(record.parameters, record.stored.startswith(manifest.recipe.weights)) for record in manifest.coverage]
    quantized, total = sum(n for n, is_quantized in stored if is_quantized), sum(n for n, _ in stored)
    name = f"{manifest.recipe.weights} (group {manifest.recipe.group_size})"
    return f"{count(quantized)} of {count(total)} parameters in {name}"
