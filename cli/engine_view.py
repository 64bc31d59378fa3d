"""The inside of a bundle's engines, from the sidecars written when they were built: `corral inspect --engine`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from corral.spec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from corral.spec.bundle import Bundle

LONGEST = 60  # characters of a kernel's layers in the table; JSON has all


def engine_view(bundle: Bundle, name: str | None) -> tuple[Any, Callable[[], None]]:
    """All engines of a bundle, or the one whose file is called `name`: JSON, and a function that prints it."""
    records = [engine for engine in bundle.manifest.engines if name in (None, engine.path)]
    if not records:
        there = ", ".join(engine.path for engine in bundle.manifest.engines) or "none"
        wanted = f'engine "{name}"' if name else "engine"
        raise InputError(f"{bundle.directory} has no {wanted}; it has: {there}. `corral build` makes them.")
    about = {engine.path: _read(bundle, engine.sidecar) for engine in records}

    def show() -> None:
        for path, engine in about.items():
            _show(path, engine)

    return about, show


def _read(bundle: Bundle, sidecar: str) -> dict[str, Any]:
    path = bundle.path(sidecar)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        _ = about["built_with"], about["weight_bytes"], [profile["name"] for profile in about["profiles"]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not readable: {error!r}. Build the engine again with `corral build`.") from None
    return about


def _show(path: str, engine: dict[str, Any]) -> None:
    from corral.cli.formats import size
    from corral.cli.tables import Table, print_table

    capabilities = ", ".join(engine["capabilities"])
    click.echo(f"{path}: {size(engine['bytes'])}, for compute capability {capabilities}, by {engine['built_with']}")
    click.echo(f"   weights {size(engine['weight_bytes'])}, {size(engine['expected_weight_bytes'])} by their bits\n")
    for profile in engine["profiles"]:
        axes = ", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in profile["axes"].items())
        click.echo(f"   {profile['name']}: {axes}")
        if "kernels" not in profile:
            click.echo("   its schedule could not be read\n")
            continue
        stored = ", ".join(f"{kind} {size(count)}" for kind, count in profile["weights"].items())
        click.echo(f"   weights by type: {stored}; other device memory {size(profile['scratch_bytes'])}\n")
        groups: Counter[tuple[str, str, str]] = Counter(
            (kernel["kind"], kernel["name"], _without_layer(kernel["layers"])) for kernel in profile["kernels"]
        )
        rows = [(str(count), kind, kernel, _shortened(layers)) for (kind, kernel, layers), count in groups.items()]
        print_table(Table(columns=("times>", "kind", "kernel", "ONNX nodes"), rows=rows))
        _show_unfused(profile["unfused_weights"])
        click.echo()


def _show_unfused(kernels: list[dict[str, Any]]) -> None:
    """Every kernel that leaves dequantized weights in memory, equal ones of several layers as one row."""
    from corral.cli.formats import size
    from corral.cli.tables import Table, print_table

    if not kernels:
        return
    click.echo(
        "\n   Kernels that write dequantized weights to memory, for products to read them back, in the largest step:\n"
    )
    groups = Counter(
        (_without_layer(kernel["layers"]), sum(t["known_bytes"] for t in writes), sum(t["most_bytes"] for t in writes))
        for kernel in kernels
        if (writes := kernel["writes"])
    )
    rows = [(str(count), layers, size(block), size(most)) for (layers, block, most), count in groups.items()]
    print_table(Table(columns=("times>", "ONNX nodes", "a block of rows>", "at most>"), rows=rows))


def _without_layer(layers: list[str]) -> str:
    """Node names without the number of their layer, so that equal layers are one row."""
    short = [".".join(part for part in layer.split(".") if part != "layers" and not part.isdigit()) for layer in layers]
    return ", ".join(dict.fromkeys(short))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
