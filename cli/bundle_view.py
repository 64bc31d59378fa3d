"""A bundle as tables, lines and JSON: what `compile` and the stages print at their end, and `inspect` at any time."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from corral.cli.formats import count, size
from corral.cli.tables import Table, print_json, print_table
from corral.spec.bundle import Bundle
from corral.spec.manifest import CoverageRecord, Manifest

# What to do with a bundle at a stage.
NEXT = {
    "exported": "corral quantize {path} -o OUT --weights int4",
    "quantized": "corral lower {path} -o OUT",
    "lowered": "corral build {path} --gpu rtx4090",
    "ready": 'corral run {path} "Once upon a time"',
}
SHOWN_FALLBACKS = 8
NEXT_WITH_ENGINE = "corral inspect {path} --engine"
NEXT_WITHOUT_TOKENIZER = "corral validate CHECKPOINT {path} --token-ids FILE"


def coverage_table(manifest: Manifest) -> Table:
    """How each kind of weight is stored."""
    rows = [
        (record.kind, _stored(record), f"{record.matrices:,}", count(record.parameters), size(record.bytes))
        for record in manifest.coverage
    ]
    parameters, stored = sum(r.parameters for r in manifest.coverage), sum(r.bytes for r in manifest.coverage)
    total = ("total", "", f"{sum(r.matrices for r in manifest.coverage):,}", count(parameters), size(stored))
    return Table(columns=("weights", "stored as", "matrices>", "parameters>", "size>"), rows=[*rows, total])


def _stored(record: CoverageRecord) -> str:
    if not record.published:
        return record.stored
    return f"{record.stored}, " + ("as published" if record.stored == record.published else f"from {record.published}")


def summary(bundle: Bundle) -> dict[str, Any]:
    """The bundle's JSON: what it is, how it is stored, and how large."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.directory),
        "stage": manifest.stage,
        "bytes": manifest.bytes,
        "recipe": manifest.recipe.to_json(),
        "engines": [dataclasses.asdict(engine) for engine in manifest.engines],
        "coverage": [dataclasses.asdict(record) for record in manifest.coverage],
        "calibration": dataclasses.asdict(manifest.calibration) if manifest.calibration else None,
    }


def origin(manifest: Manifest) -> str:
    """The checkpoint's name, and of one from the Hub its commit."""
    name = manifest.source.get("name", "an unnamed checkpoint")
    return f"{name}@{manifest.source['revision']}" if "revision" in manifest.source else name


def calibration_lines(manifest: Manifest) -> list[str]:
    """What the weights were calibrated on, and which experts were quantized without; nothing where none were calibrated."""
    record = manifest.calibration
    if record is None:
        return []
    lines = [f"calibrated on {record.tokens:,} tokens of {record.text}, in windows of {record.window}"]
    if record.fallbacks:
        named = [f"{f.weight}.{f.expert} ({f.tokens})" for f in record.fallbacks]
        lines.append(
            f"{len(named)} experts saw fewer than {record.min_tokens} tokens and were quantized by "
            f"{record.fallbacks[0].method} instead: {', '.join(named[:SHOWN_FALLBACKS])}"
            + (f" and {len(named) - SHOWN_FALLBACKS} more (corral inspect --json)" if named[SHOWN_FALLBACKS:] else "")
        )
    return lines


def next_command(bundle: Bundle) -> str:
    """The command that a person with this bundle most likely wants next."""
    manifest = bundle.manifest
    if manifest.engines:
        return NEXT_WITH_ENGINE.format(path=bundle.directory)
    without = manifest.stage == "ready" and manifest.tokenizer is None
    return (NEXT_WITHOUT_TOKENIZER if without else NEXT[manifest.stage]).format(path=bundle.directory)


def show_written(bundle: Bundle, *, as_json: bool) -> None:
    """Say what was written, where, and what comes next."""
    if as_json:
        print_json(summary(bundle))
        return
    recipe = bundle.manifest.recipe
    weights = f"{recipe.weights} and others" if recipe.rules else recipe.weights
    what = {
        "exported": "graph and plan, no weights yet",
        "quantized": f"graph and plan for {weights}, no weights yet",
        "lowered": f"{weights} for target {recipe.target}, no engine yet",
        "ready": f"{weights} for target {recipe.target}"
        + "".join(f", engine for {', '.join(engine.capabilities)}" for engine in bundle.manifest.engines),
    }[bundle.manifest.stage]
    print_table(coverage_table(bundle.manifest))
    for line in calibration_lines(bundle.manifest):
        click.echo(f"   {line}")
    click.echo(f"\n   {bundle.directory}: {size(bundle.bytes)}, {what}\n   next: {next_command(bundle)}")
