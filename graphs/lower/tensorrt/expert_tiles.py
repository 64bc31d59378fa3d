"""Experts' matrices [E, H, 2 I] and [E, I, H] -> tiles of I / n of the inner columns, each a weight of its own.

A tile of gate_up holds the gate's columns and then the up projection's. Slices of one weight would not do: a builder
then dequantizes the whole once, for all of them. The numbers are the same. What is quantized by groups of inputs is cut
before, so that a job reads a tile. What is quantized as a whole (gptq and awq; the inputs of FP8 and NVFP4, whose outputs have
one scale each) is cut after: the tiles of an expert are one job.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.float_weight import FloatWeight, find_float, write_float
from corral.graphs.quantize.quantized_weight import QuantizedWeight, find_quantized
from corral.spec.errors import InputError
from corral.spec.expert_tiles import chosen_tiles
from corral.spec.weight_plan import Entry, Source, step

Tile = tuple[ir.Value, ir.Value]  # gate_up, down


def cut_experts(work: ModelAndPlan, node: ir.Node) -> list[Tile]:
    """The matrices of a corral::MoE in as many tiles as the recipe says, or where that is open as its GPU's cache wants.

    Raises InputError where the recipe's tiles do not hold whole groups of inputs.
    """
    gate_up, down = node.inputs[2:4]
    assert gate_up is not None and down is not None
    tiles = _tiles(work, down)
    if tiles == 1:
        return [(gate_up, down)]
    return list(
        zip(_cut(work, node, gate_up, tiles, rows=True), _cut(work, node, down, tiles, rows=False), strict=True)
    )


def _tiles(work: ModelAndPlan, down: ir.Value) -> int:
    config, tiles = work.config, work.recipe.expert_tiles
    if tiles == 1:
        return 1
    weight = find_quantized(work, down) or find_float(work, down)
    entry = weight.codes if weight else work.entry_of(down)
    if entry is None:  # not planned: there is nothing to store otherwise
        return 1
    stored = work.recipe.of(entry.weight)
    if not tiles:
        return chosen_tiles(config, weights=stored.weights, group_size=stored.group_size, gpu=work.recipe.gpu)
    if config.intermediate_size % (tiles * stored.group_size):
        raise InputError(
            f"expert_tiles is {tiles}: the experts' {config.intermediate_size} columns do not divide into that many "
            f"tiles of whole groups of {stored.group_size}. Choose another --expert-tiles, or a smaller --group-size."
        )
    return tiles


def _cut(work: ModelAndPlan, node: ir.Node, weight: ir.Value, tiles: int, *, rows: bool) -> list[ir.Value]:
    """One weight in tiles of its outputs (`rows` of its sources), or of its inputs."""
    quantized, number, entry = find_quantized(work, weight), find_float(work, weight), work.entry_of(weight)
    build = tape.Tape()
    if quantized is not None:
        values = _cut_quantized(build, work, quantized, tiles, rows)
    elif number is not None:
        values = _cut_float(build, work, number, tiles, rows)
    elif entry is not None:
        values = work.replace_weight(entry, *_parts(entry, tiles, rows, axis=2 if rows else 1))
    else:
        raise PatternAbsent(f"the experts' {weight.name} is no planned weight")
    work.graph.insert_before(node, build.nodes)
    return values


def _cut_quantized(
    build: tape.Tape, work: ModelAndPlan, weight: QuantizedWeight, tiles: int, rows: bool
) -> list[ir.Value]:
    scope, how = weight.dequantize.metadata_props[SCOPE], {"axis": 1, "block_size": weight.group_size}
    parts = []
    for stored in (weight.codes, weight.scales):
        work.unlink(stored)
        parts.append(work.replace_weight(stored, *_parts(stored, tiles, rows, axis=2 if rows else 1)))
    return [
        _scoped(build, f"{scope}.{i}", build.op("DequantizeLinear", pair, how))
        for i, pair in enumerate(zip(*parts, strict=True))
    ]


def _cut_float(build: tape.Tape, work: ModelAndPlan, weight: FloatWeight, tiles: int, rows: bool) -> list[ir.Value]:
    """Gains are an output's: tiles of outputs have their own, tiles of inputs share them."""
    parts = []
    for stored in weight.entries:
        if stored is weight.gains and not rows:
            parts.append([weight.gain] * tiles)
            continue
        work.unlink(stored)
        axis = 2 if stored is weight.gains or not rows else 1
        parts.append(work.replace_weight(stored, *_parts(stored, tiles, rows, axis)))
    return [
        _scoped(build, f"{weight.codes.weight}.{i}", write_float(build, work, *part))
        for i, part in enumerate(zip(*parts, strict=True))
    ]


def _scoped(build: tape.Tape, scope: str, value: ir.Value) -> ir.Value:
    """Say of what was just built where it belongs."""
    for node in build.nodes:
        node.metadata_props.setdefault(SCOPE, scope)
    return value


def _parts(entry: Entry, tiles: int, rows: bool, axis: int) -> list[Entry]:
    """An entry in tiles of outputs (`rows`) or inputs, which lie along `axis` of what is stored."""
    size = entry.shape[axis] // tiles
    shape = (*entry.shape[:axis], size, *entry.shape[axis + 1 :])
    in_source = entry.cut == "columns" or (rows and entry.cut == "rows")
    made = []
    for i in range(tiles):
        taken = step("take", axis=0 if rows else 1, start=i * size, stop=(i + 1) * size)
        pieces = tuple((_rows if rows else _columns)(piece, i, tiles, in_source) for piece in entry.pieces)
        made.append(
            dataclasses.replace(
                entry,
                name=f"{entry.name}.{i}",
                shape=shape,
                pieces=pieces,
                steps=entry.steps if in_source else (*entry.steps[:-1], taken, entry.steps[-1]),
                parameters=0 if i else entry.parameters,  # counted once
                cut_multiple=size if rows and entry.cut == "rows" else entry.cut_multiple,
            )
        )
    return made


def _rows(piece: Source, i: int, tiles: int, in_source: bool) -> Source:
    """Of gate and up alike: with runs of a tile's half, whole tiles lie behind each other."""
    outputs = (piece.rows[1] - piece.rows[0]) // tiles
    cut = (i * outputs, (i + 1) * outputs) if in_source else piece.rows
    return dataclasses.replace(piece, rows=cut, interleave=outputs // 2)


def _columns(piece: Source, i: int, tiles: int, in_source: bool) -> Source:
    if not in_source:
        return piece
    assert piece.columns is not None
    start, stop = piece.columns
    inputs = (stop - start) // tiles
    return dataclasses.replace(piece, columns=(start + i * inputs, start + (i + 1) * inputs))
