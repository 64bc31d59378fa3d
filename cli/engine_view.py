"""The inside of a bundle's engines, as tables and JSON: `corral inspect --engine`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from corral.cli.engine_report import EngineReport, ProfileReport, Unfused, read_sidecars
from corral.cli.formats import size
from corral.cli.tables import Table, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from corral.spec.bundle import Bundle

LONGEST = 60  # characters of a kernel's layers in the table; JSON has all


def engine_view(bundle: Bundle, name: str | None) -> tuple[Any, Callable[[], None]]:
    """All engines of a bundle, or the one whose file is called `name`: JSON, and a function that prints it."""
    sidecars = read_sidecars(bundle, name)

    def show() -> None:
        for path, engine in sidecars.reports.items():
            _show(path, engine)

    return sidecars.json, show


def _show(path: str, engine: EngineReport) -> None:
    capabilities = ", ".join(engine.capabilities)
    click.echo(f"{path}: {size(engine.bytes)}, for compute capability {capabilities}, by {engine.built_with}")
    click.echo(f"   weights {size(engine.weight_bytes)}, {size(engine.expected_weight_bytes)} by their bits\n")
    for profile in engine.profiles:
        _show_profile(profile)


def _show_profile(profile: ProfileReport) -> None:
    click.echo(f"   {profile.name}: {profile.ranges}")
    if not profile.kernels:
        click.echo("   its schedule could not be read\n")
        return
    stored = ", ".join(f"{kind} {size(count)}" for kind, count in profile.weights.items())
    click.echo(f"   weights by type: {stored}; other device memory {size(profile.scratch_bytes)}\n")
    groups: Counter[tuple[str, str, str]] = Counter(
        (kernel.kind, kernel.name, _without_layer(kernel.layers)) for kernel in profile.kernels
    )
    rows = [(str(count), kind, kernel, _shortened(layers)) for (kind, kernel, layers), count in groups.items()]
    print_table(Table(columns=("times>", "kind", "kernel", "ONNX nodes"), rows=rows))
    _show_unfused(profile.unfused_weights)
    click.echo()


def _show_unfused(kernels: Sequence[Unfused]) -> None:
    """Every kernel that leaves dequantized weights in memory, equal ones of several layers as one row."""
    if not kernels:
        return
    click.echo(
        "\n   Kernels that write dequantized weights to memory, for products to read them back, in the largest step:\n"
    )
    groups = Counter((_without_layer(k.layers), k.known_bytes, k.most_bytes) for k in kernels if k.writes)
    rows = [(str(count), layers, size(block), size(most)) for (layers, block, most), count in groups.items()]
    print_table(Table(columns=("times>", "ONNX nodes", "a block of rows>", "at most>"), rows=rows))


def _without_layer(layers: Sequence[str]) -> str:
    """Node names without the number of their layer, so that equal layers are one row."""
    short = [".".join(part for part in layer.split(".") if part != "layers" and not part.isdigit()) for layer in layers]
    return ", ".join(dict.fromkeys(short))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
