"""`corral plan`: what a model needs, before a byte of its weights is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli.options import json_option
from corral.spec.errors import InputError
from corral.spec.gpus import GPUS, gpu_named
from corral.spec.quant_scheme import DEFAULT_GROUP_SIZE, GROUP_SIZES
from corral.spec.storage import WEIGHT_BITS

if TYPE_CHECKING:
    from corral.spec.estimate import Estimate
    from corral.spec.model_config import ModelConfig

SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20}
SHOWN = ("bf16", "fp8", "int8", "int4")


@click.command("plan")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--weights", help=f"Only this storage, of {', '.join(WEIGHT_BITS)}.  [default: a comparison; JSON: int4]")
@click.option(
    "--group-size", type=int, default=DEFAULT_GROUP_SIZE, show_default=True, help="Inputs that share a scale."
)
@click.option(
    "--target", default="cpu", show_default=True, help="Of --exact, and of experts in tiles: the target to plan for."
)
@click.option("--context", default="128k", show_default=True, help="Tokens of a sequence: 131072, 128k, 10M.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--kv", default="bf16", show_default=True, help="How the KV cache is stored: fp32, bf16, fp8, int8, int4."
)
@click.option("--gpu", default="h100", show_default=True, help=f"Where to serve: {', '.join(GPUS)}.")
@click.option("--price-per-hour", type=float, help="Price of one GPU, for the cost of a million tokens.")
@click.option("--exact", is_flag=True, help="Capture the graph and count weights by its plan (slower).")
@json_option
def command(
    checkpoint: Path, weights: str | None, group_size: int, target: str, exact: bool, as_json: bool, **options: Any
) -> None:
    """Say what a CHECKPOINT, or a preset such as scout, needs: size, memory, GPUs, speed at most, cost.

    Figures follow from formulas; nothing is measured.
    """
    from corral.cli.expert_tiles_view import expert_tiles, show_expert_tiles
    from corral.cli.tables import print_json
    from corral.spec.estimate import Serving, estimate
    from corral.spec.target import target_named
    from corral.spec.tensorrt_flavors import FLAVORS

    gpu = gpu_named(options.pop("gpu"))
    if group_size not in GROUP_SIZES:
        raise InputError(f"group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}.")
    title, config, dtype, notes = _find(checkpoint)
    options["context"] = min(_tokens(options["context"]), _default_limit(config, options["context"]))
    choice = weights or "int4"
    names = list(dict.fromkeys([choice] if weights else SHOWN))
    builds = {
        name: estimate(config, Serving(weights=name, group_size=group_size, dtype=dtype, **options), gpu)
        for name in names
    }
    data: dict[str, Any] = {"model": title, "notes": notes, **builds[choice].to_json()}
    data["builds"] = {name: build.to_json() for name, build in builds.items()}
    if exact:
        data["exact_weights_bytes"] = _exact(checkpoint, target, choice, group_size)
    module = target_named(target).engine
    tiled = module is not None and not FLAVORS[module].plugins and config.num_local_experts > 0
    if tiled:
        data["expert_tiles"] = expert_tiles(config, choice, group_size, gpu)
    if as_json:
        print_json(data)
        return
    _show(title, config, builds, data)
    if tiled:
        show_expert_tiles(data["expert_tiles"], gpu)


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})([kKmM]?)", text)
    if match is None:
        raise InputError(f'context is "{text[:40]}", expected a number of tokens such as 131072, 128k or 10M.')
    return int(match[1]) * SUFFIXES[match[2].lower()]


def _default_limit(config: ModelConfig, context: str) -> int:
    """The default context is cut to a small model's; one that was asked for is not."""
    return config.max_position_embeddings if context == "128k" else 1 << 62


def _find(checkpoint: Path) -> tuple[str, ModelConfig, str, list[str]]:
    """Title, config, dtype, and what must be said beside the figures."""
    from corral.spec.presets import PRESETS

    name = str(checkpoint).removeprefix("synthetic:")
    if name in PRESETS and not checkpoint.is_dir():
        preset = PRESETS[name]
        notes = [f"inferred, not published: {', '.join(preset.inferred)}"] if preset.inferred else []
        if preset.vision_parameters:
            notes.append(
                f"text decoder only: the vision tower ({preset.vision_parameters / 1e9:.2f} B) is not compiled"
            )
        return preset.title, preset.model, preset.dtype, notes
    from corral.model.checkpoint import open_checkpoint
    from corral.model.checkpoint.hub import hub_name
    from corral.model.checkpoint.names import EMBEDDING

    if not checkpoint.exists() and not str(checkpoint).startswith("synthetic:") and hub_name(checkpoint) is None:
        raise InputError(f"{checkpoint} is neither a checkpoint directory nor a preset; presets: {', '.join(PRESETS)}.")
    source = open_checkpoint(checkpoint, weights=False)
    return source.name, source.config, source.info(EMBEDDING).dtype, []


def _exact(checkpoint: Path, target: str, weights: str, group_size: int) -> int:
    from corral.graphs.compiler import lower
    from corral.model.checkpoint import open_checkpoint
    from corral.spec.presets import PRESETS
    from corral.spec.recipe import Recipe

    preset = str(checkpoint) in PRESETS and not checkpoint.is_dir()
    source = open_checkpoint(f"synthetic:{checkpoint}" if preset else checkpoint, weights=False)
    recipe = Recipe(target=target, weights=weights, group_size=group_size, requantize=True)
    return sum(entry.nbytes for entry in lower(source, recipe).plan)


def _show(title: str, config: ModelConfig, builds: dict[str, Estimate], data: dict[str, Any]) -> None:
    from corral.cli.formats import DASH, TIMES, count, size
    from corral.cli.tables import Table, print_table

    rope, told = sum(layer.rope for layer in config.layers), data["parameters"]
    click.echo(
        f"{title}: {count(told['total'])} parameters, {count(told['active'])} active per token, {config.num_layers} "
        f"layers ({rope} rope, {config.num_layers - rope} nope), context {data['context']:,}, batch {data['batch']}"
    )
    rows = []
    for name, build in builds.items():
        cost = build.cost_per_million
        rows.append(
            (
                name,
                size(build.weights_bytes),
                size(build.kv_bytes),
                size(build.activations),
                size(build.vram_bytes),
                _where(build, TIMES),
                size(build.bytes_per_token),
                f"{build.tokens_per_second:.0f}" if build.gpus else DASH,
                f"${cost:.2f}" if cost is not None else DASH,
            )
        )
    columns = (
        "",
        "weights>",
        "KV>",
        "activations>",
        "VRAM>",
        "fits on",
        "read a step>",
        "tokens/s at most>",
        "per 1 M>",
    )
    print_table(Table(columns=columns, rows=rows))
    click.echo(f"\n   compile here: up to {size(data['compile_peak_bytes'])} of memory, disk as much as the weights")
    if "exact_weights_bytes" in data:
        click.echo(f"   exact plan of {data['weights']}: {size(data['exact_weights_bytes'])} of weights")
    for note in data["notes"]:
        click.echo(f"   {note}")


def _where(build: Estimate, times: str) -> str:
    """The GPUs that hold it, or what would where those asked for do not."""
    from corral.spec.estimate import estimate

    if build.gpu.count:
        if build.fits:
            return f"{build.gpu.title}, {build.gpus} stages"
    elif build.gpus is not None:
        return f"{build.gpus} {times} {build.gpu.title}"
    for gpu in (gpu for gpu in GPUS.values() if not gpu.count):
        other = estimate(build.config, build.serving, gpu)
        if other.gpus is not None:
            return f"does not fit; {other.gpus} {times} {gpu.title} would"
    return "does not fit; nor on any GPU known here"
