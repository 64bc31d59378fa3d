"""Experts' matrices [E, H, 2 I] and [E, I, H] -> tiles of I / n of the inner columns, each a weight of its own.

A tile of gate_up holds the gate's columns and then the up projection's. Slices of one weight would not do: a builder
then dequantizes the whole once, for all of them. The numbers are the same: groups of inputs stay whole.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.errors import InputError
from corral.spec.weight_plan import Entry, Source

Tile = tuple[ir.Value, ir.Value]  # gate_up, down


def cut_experts(work: ModelAndPlan, node: ir.Node, tiles: int) -> list[Tile]:
    """The matrices of a corral::MoE, in tiles. Raises InputError where these do not hold whole groups of inputs."""
    gate_up, down = node.inputs[2:4]
    assert gate_up is not None and down is not None
    if tiles == 1:
        return [(gate_up, down)]
    width = work.config.intermediate_size
    if width % tiles or (width // tiles) % work.recipe.group_size:
        raise InputError(
            f"expert_tiles is {tiles}: the experts' {width} columns do not divide into that many tiles of whole groups "
            f"of {work.recipe.group_size}. Choose another --expert-tiles, or a smaller --group-size."
        )
    return list(
        zip(_cut(work, node, gate_up, tiles, rows=True), _cut(work, node, down, tiles, rows=False), strict=True)
    )


def _cut(work: ModelAndPlan, node: ir.Node, weight: ir.Value, tiles: int, *, rows: bool) -> list[ir.Value]:
    """One weight in tiles of its outputs (`rows` of its sources), or of its inputs."""
    quantized, entry = find_quantized(work, weight), work.entry_of(weight)
    if quantized is None:
        if entry is None:
            raise PatternAbsent(f"{weight.name} is no planned weight")
        return work.replace_weight(entry, *(_tile(entry, i, tiles, rows) for i in range(tiles)))
    if quantized.codes.cut is None:
        raise InputError(
            f"--method {work.recipe.method} quantizes an expert's matrices as a whole, so they cannot be cut into "
            f"{tiles} tiles. Use --expert-tiles 1, or another --method."
        )
    for i in range(2):
        quantized.dequantize.replace_input_with(i, None)
    parts = [
        work.replace_weight(stored, *(_tile(stored, i, tiles, rows) for i in range(tiles)))
        for stored in (quantized.codes, quantized.scales)
    ]
    scope, how = quantized.dequantize.metadata_props[SCOPE], {"axis": 1, "block_size": quantized.group_size}
    dequantized = [
        ir.node("DequantizeLinear", pair, how, metadata_props={SCOPE: f"{scope}.{i}"})
        for i, pair in enumerate(zip(*parts, strict=True))
    ]
    work.graph.insert_before(node, dequantized)
    return [tile.outputs[0] for tile in dequantized]


def _tile(entry: Entry, i: int, tiles: int, rows: bool) -> Entry:
    experts, inputs, outputs = entry.shape
    return dataclasses.replace(
        entry,
        name=f"{entry.name}.{i}",
        shape=(experts, inputs, outputs // tiles) if rows else (experts, inputs // tiles, outputs),
        pieces=tuple((_rows if rows else _columns)(piece, i, tiles) for piece in entry.pieces),
        parameters=0 if i else entry.parameters,  # counted once
    )


def _rows(piece: Source, i: int, tiles: int) -> Source:
    """Of gate and up alike: with runs of a tile's half, whole tiles lie behind each other."""
    outputs = (piece.rows[1] - piece.rows[0]) // tiles
    return dataclasses.replace(piece, rows=(i * outputs, (i + 1) * outputs), interleave=outputs // 2)


def _columns(piece: Source, i: int, tiles: int) -> Source:
    assert piece.columns is not None
    start, stop = piece.columns
    inputs = (stop - start) // tiles
    return dataclasses.replace(piece, columns=(start + i * inputs, start + (i + 1) * inputs))
