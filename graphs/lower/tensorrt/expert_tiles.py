"""Experts' matrices [E, H, 2 I] and [E, I, H] -> tiles of I / n of the inner columns, each a weight of its own.

A tile of gate_up holds the gate's columns and then the up projection's. Slices of one weight would not do: a builder
then dequantizes the whole once, for all of them. The numbers are the same: groups of inputs stay whole.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.errors import InputError
from corral.spec.expert_tiles import chosen_tiles
from corral.spec.weight_plan import Entry, Source

Tile = tuple[ir.Value, ir.Value]  # gate_up, down


def cut_experts(work: ModelAndPlan, node: ir.Node) -> list[Tile]:
    """The matrices of a corral::MoE in as many tiles as the recipe says, or where that is open as its GPU's cache wants.

    Raises InputError where the recipe's tiles do not hold whole groups of inputs, or the matrices cannot be cut.
    """
    gate_up, down = node.inputs[2:4]
    assert gate_up is not None and down is not None
    tiles = _tiles(work, gate_up, down)
    if tiles == 1:
        return [(gate_up, down)]
    return list(
        zip(_cut(work, node, gate_up, tiles, rows=True), _cut(work, node, down, tiles, rows=False), strict=True)
    )


def _tiles(work: ModelAndPlan, gate_up: ir.Value, down: ir.Value) -> int:
    config, tiles = work.config, work.recipe.expert_tiles
    entries = [_divisible(work, weight) for weight in (gate_up, down)]
    if tiles == 1 or not (tiles or all(entries)):
        return 1
    if None in entries:
        raise InputError(
            f"expert_tiles is {tiles}, but these experts cannot be cut: FP8 has one scale for all of an output's inputs, "
            "and gptq quantizes a matrix as a whole. Use --expert-tiles 1, or other --weights or --method."
        )
    assert entries[1] is not None
    stored = work.recipe.of(entries[1].weight)
    if not tiles:
        return chosen_tiles(config, weights=stored.weights, group_size=stored.group_size, gpu=work.recipe.gpu)
    if config.intermediate_size % (tiles * stored.group_size):
        raise InputError(
            f"expert_tiles is {tiles}: the experts' {config.intermediate_size} columns do not divide into that many "
            f"tiles of whole groups of {stored.group_size}. Choose another --expert-tiles, or a smaller --group-size."
        )
    return tiles


def _divisible(work: ModelAndPlan, weight: ir.Value) -> Entry | None:
    """The entry of a weight that is stored as it is, or quantized by groups of inputs; None for any other."""
    quantized = find_quantized(work, weight)
    if quantized is not None:
        return quantized.codes if quantized.codes.cut == "columns" else None
    return work.entry_of(weight)


def _cut(work: ModelAndPlan, node: ir.Node, weight: ir.Value, tiles: int, *, rows: bool) -> list[ir.Value]:
    """One weight in tiles of its outputs (`rows` of its sources), or of its inputs."""
    quantized, entry = find_quantized(work, weight), work.entry_of(weight)
    if quantized is None:
        assert entry is not None
        return work.replace_weight(entry, *(_tile(entry, i, tiles, rows) for i in range(tiles)))
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
