"""Options that several commands share: spelled, explained and defaulted once."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from corral.spec.quant_scheme import GROUP_SIZES, SCHEMES
from corral.spec.recipe import METHODS, Recipe, read_recipe
from corral.spec.target import TARGETS

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
out_option = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
layers_option = click.option(
    "--layers", metavar="A-B", help="Take only these layers, or the first N: the same as CHECKPOINT?layers=A-B."
)
fresh_option = click.option("--fresh", is_flag=True, help="Start over: replace what OUT holds of corral's.")
jobs_option = click.option("--jobs", type=int, help="Processes that compute weights.  [default: as many as pay off]")
ray_option = click.option("--ray", metavar="HOST:PORT", help="Compute weights on this Ray cluster, not here.")
provider_option = click.option("--provider", default="cpu", show_default=True, help="ONNX Runtime execution provider.")
threads_option = click.option("--threads", type=int, help="CPU threads.  [default: one a physical core]")


def command_line(context: click.Context) -> str:
    """The command that is running as a shell takes it: arguments, and the options that somebody gave."""
    words = [*context.command_path.split()]
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name or ""]
        for one in value if parameter.multiple or parameter.nargs != 1 else (value,):
            words += [parameter.opts[-1]] if isinstance(parameter, click.Option) else []
            words += [] if one is True else [str(one)]
    return shlex.join(words)


def part_of(checkpoint: Path, layers: str | None) -> Path:
    """The checkpoint that CHECKPOINT and `--layers` name together."""
    return checkpoint if layers is None else checkpoint.with_name(f"{checkpoint.name}?layers={layers}")


# What the recipe's keys mean; a test holds it complete. Rules are for files.
RECIPE_HELP = {
    "target": f"Where it will run: {', '.join(TARGETS)}.",
    "weights": f"How weight matrices are stored: {', '.join(SCHEMES)}.",
    "method": f"How they are quantized: {', '.join(METHODS)}.",
    "calibration": "For calibrated methods and fp8: a text file, or the name of a text that corral ships.",
    "calibration_tokens": "Tokens of that text that are used, at most.",
    "stages": "Ranges of layers, each with a graph and weight shards of its own.",
    "stage_gb": "As many more stages that none has more GB of weights; 0: no limit.",
    "kernels": "What computes quantized weights on cpu: stock (ONNX Runtime's own) or corral (corral's CPU kernels).",
    "kv": "The KV cache: float, or with corral's CPU kernels int8 or int4.",
    "requantize": "Quantize weights again that CHECKPOINT stores quantized in another way.",
    "gpu": "Build engines for these GPUs or compute capabilities, by comma: rtx4090, a100, 8.9.",
    "max_context": "Of engines: tokens of a sequence.",
    "max_batch": "Of engines: sequences that decode together.",
    "expert_tiles": "Of engines: tiles of the experts' columns; 0: chosen for the GPU.",
    "weight_streaming": "Of engines: build them so that part of the weights may stay in the host's memory.",
    "group_size": f"Inputs that share a scale: {', '.join(map(str, GROUP_SIZES))}.",
    "asymmetric": "Give each group of int4, int3 or int2 codes a zero point of its own.",
}


def recipe_options(command: F) -> F:
    """`--recipe FILE`, and an option for each key of a recipe; `chosen_recipe` reads them."""
    for field in reversed([field for field in dataclasses.fields(Recipe) if field.name in RECIPE_HELP]):
        flag = isinstance(field.default, bool)
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            field.name,
            # Not click.Choice: a wrong value gets the answer that it gets in Python and in a recipe file.
            type=type(field.default),
            is_flag=flag,
            default=None,  # so that a recipe file has its say
            help=RECIPE_HELP[field.name] + ("" if flag else f"  [default: {field.default or 'none'}]"),
        )(command)
    return click.option(
        "--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML file with these options as keys."
    )(command)


def chosen_recipe(recipe_file: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe that options and file amount to; an option beats the file."""
    if recipe_file is not None:
        return read_recipe(recipe_file, **options)
    return Recipe.from_json({key: value for key, value in options.items() if value is not None}, where="options")


def sampling_options(*, temperature: float) -> Callable[[F], F]:
    """The options of SamplingParams that a person wants at a prompt; `chosen_sampling` reads them."""
    options = (
        click.option("--max-tokens", type=int, default=128, show_default=True, help="Stop after as many tokens."),
        click.option(
            "--temperature",
            type=float,
            default=temperature,
            show_default=True,
            help="Randomness; 0 takes the likeliest.",
        ),
        click.option("--top-k", type=int, help="Choose among the K likeliest tokens."),
        click.option("--top-p", type=float, help="Choose among the likeliest tokens that make up P."),
        click.option("--min-p", type=float, help="Choose among tokens at least P as likely as the likeliest."),
        click.option("--repetition-penalty", type=float, help="Above 1: avoid tokens that were there before."),
        click.option("--seed", type=int, help="Same seed, same text."),
        click.option("--stop", multiple=True, help="End before this text (may be given several times)."),
        click.option("--ignore-eos", is_flag=True, default=None, help="Go on after an end token."),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def chosen_sampling(options: dict[str, Any]) -> Any:
    """SamplingParams of the options given; what was not given keeps its default there."""
    from corral.runtime import SamplingParams

    return SamplingParams(**{key: value for key, value in options.items() if value is not None})
