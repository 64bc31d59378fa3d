"""`corral inspect`: what a bundle is, down to where each stored byte came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli.options import json_option

if TYPE_CHECKING:
    from corral.spec.bundle import Bundle


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@click.option("--coverage", "views", flag_value="coverage", help="How each kind of weight is stored.")
@click.option("--files", "views", flag_value="files", help="Every file with its size and SHA-256.")
@click.option(
    "--plan",
    "views",
    flag_value="plan",
    help="Where each stored tensor came from; NAME (or a pattern with *) picks some.",
)
@click.option("--graph", "views", flag_value="graph", help="Which operators the graph is made of (needs onnx).")
@click.option("--engine", "views", flag_value="engine", help="What is inside its engines: kernels, weights, memory.")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    help="Write its engines as a page to this file: the whole inside.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    help="Write one step's inputs of its (first) graph to this file, for Polygraphy's --load-inputs.",
)
@click.option("--verify", is_flag=True, help="Hash every file first.")
@json_option
def command(
    bundle: Path,
    name: str | None,
    views: str | None,
    page: Path | None,
    inputs: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what a BUNDLE is, or the inside of one .engine file of it."""
    from corral.cli.progress import show_progress
    from corral.cli.tables import print_json
    from corral.spec.bundle import open_bundle
    from corral.spec.errors import InputError

    if bundle.suffix == ".engine":
        bundle, name, views = bundle.parent, bundle.name, "engine"
    elif name is not None and views != "plan":
        raise InputError(f'NAME ("{name}") belongs to --plan. Run `corral inspect {bundle} --plan "{name}"`.')
    if page is not None:
        if views not in (None, "engine"):
            raise InputError(f"--html shows engines, and --{views} asks for something else. Leave one of them out.")
        views = "engine"
    if inputs is not None and (views is not None or as_json):
        raise InputError("--inputs writes a file and shows nothing. Leave the other options out.")
    with show_progress() as progress:
        opened = open_bundle(bundle, verify=verify, progress=progress)
    if page is not None:
        _write_page(opened, name, page)
        return
    if inputs is not None:
        _write_inputs(opened, inputs)
        return
    data, show = VIEWS[views or "summary"](opened, name)
    if as_json:
        print_json(data)
        return
    show()
    if verify:
        click.echo(f"   every file is as the manifest says ({len(opened.manifest.files)} files)")


def _write_page(bundle: Bundle, name: str | None, page: Path) -> None:
    from corral.cli.engine_page import engine_page
    from corral.cli.engine_report import read_sidecars
    from corral.cli.written_file import write_named

    html = engine_page(bundle, read_sidecars(bundle, name)).encode()
    click.echo(write_named(page, "--html", html, "complete by itself; open it in a browser"))


def _write_inputs(bundle: Bundle, file: Path) -> None:
    from corral.cli.written_file import write_named
    from corral.validate.polygraphy_inputs import polygraphy_file

    graph = bundle.path(bundle.manifest.graphs[0].path)
    use = f"for `polygraphy run {graph} --onnxrt --load-inputs {file}`"
    click.echo(write_named(file, "--inputs", polygraphy_file(bundle), use))


# What a view is: its JSON, and a function that prints it for a person.
View = tuple[Any, Callable[[], None]]


def _summary(bundle: Bundle, _: str | None) -> View:
    from corral.cli.bundle_view import calibration_lines, coverage_table, next_command, origin, summary
    from corral.cli.formats import counted, size
    from corral.cli.tables import print_table

    manifest, model = bundle.manifest, bundle.manifest.model
    experts = f"{model.num_local_experts} experts, " if any(layer.moe for layer in model.layers) else ""
    nope = sum(not layer.rope for layer in model.layers)
    rows = {
        "stage": manifest.stage,
        "model": f"{counted(model.num_layers, 'layer')} ({model.num_layers - nope} rope, {nope} nope), {experts}"
        f"hidden {model.hidden_size}, vocabulary {model.vocab_size:,}",
        "recipe": ", ".join(f"{key} {value}" for key, value in manifest.recipe.to_json().items() if value),
        "stages": "; ".join(
            f"layers {graph.first_layer}-{graph.end_layer - 1} in {graph.path}" for graph in manifest.graphs
        ),
        "engines": "; ".join(
            f"{engine.path} for {', '.join(engine.capabilities)} by {engine.built_with}" for engine in manifest.engines
        )
        or "none",
        "size": f"{size(manifest.bytes)} in {counted(len(manifest.files), 'file')}",
        "KV cache": "; ".join(
            f"{kv.kv_class}: {counted(len(kv.layers), 'layer')}, {size(kv.row_bytes())} a token"
            + (f" up to {kv.chunk:,} tokens" if kv.chunk else "")
            for kv in manifest.kv
        ),
        "tokenizer": manifest.tokenizer or "none: token ids only",
        "chat": manifest.chat_template or "no chat template",
        "needs": ", ".join(f"{package} {least} or newer" for package, least in manifest.requires.items()),
        "made by": f"corral {manifest.corral} from {origin(manifest)}",
    }

    def show() -> None:
        click.echo(f"{bundle.directory}\n")
        for key, value in rows.items():
            click.echo(f"   {key:<11}{value}")
        click.echo()
        print_table(coverage_table(manifest))
        for line in calibration_lines(manifest):
            click.echo(f"   {line}")
        click.echo(f"\n   next: {next_command(bundle)}")

    more = {"model": model.to_json(), "kv": [dataclasses.asdict(kv) for kv in manifest.kv]}
    rest = {"tokenizer": manifest.tokenizer, "requires": manifest.requires, "source": manifest.source}
    return {**summary(bundle), **more, **rest, "corral": manifest.corral, "format": manifest.format}, show


def _coverage(bundle: Bundle, _: str | None) -> View:
    from corral.cli.bundle_view import coverage_table, summary
    from corral.cli.tables import print_table

    return summary(bundle)["coverage"], lambda: print_table(coverage_table(bundle.manifest))


def _files(bundle: Bundle, _: str | None) -> View:
    from corral.cli.formats import size
    from corral.cli.tables import Table, print_table

    files = bundle.manifest.files
    rows = [(record.path, size(record.bytes), record.sha256) for record in files]
    table = Table(columns=("file", "size>", "SHA-256"), rows=rows)
    return [dataclasses.asdict(record) for record in files], lambda: print_table(table)


def _plan(bundle: Bundle, name: str | None) -> View:
    from corral.cli.plan_view import plan_view

    return plan_view(bundle, name)


def _graph(bundle: Bundle, _: str | None) -> View:
    from corral.cli.graph_view import graph_view

    return graph_view(bundle)


def _engine(bundle: Bundle, name: str | None) -> View:
    from corral.cli.engine_view import engine_view

    return engine_view(bundle, name)


VIEWS: dict[str, Callable[[Bundle, str | None], View]] = {
    "summary": _summary,
    "coverage": _coverage,
    "files": _files,
    "plan": _plan,
    "graph": _graph,
    "engine": _engine,
}
