"""Products by matrices of one value, as a builder stores each matrix once for all profiles.

    MatMul(x, W_q), MatMul(x, W_k), MatMul(x, W_v)  ->  Split(Reshape(MatMul(x, Transpose(W_qkv))), axis=-2)

q, k and v are joined, and so are gate and up: in a prefill the builder does so by itself, in a decode step it does not, and
an engine of both profiles then held the matrices twice. The Split is of equal columns behind a Reshape: one of the last axis
is moved before a prefill's product, and what the builder then joins again is another matrix to it.

The joined matrix is stored [outputs, inputs], rows after rows, because that is how pieces of several tensors become one; the
builder folds the Transpose. FP8 is stored so in any case, and what it multiplies with is then rounded once for all. So is
every other matrix in 16 bits: of the head, which is multiplied by few rows in every profile, the builder otherwise stored
both orders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.float_weight import find_float, write_float
from corral.graphs.quantize.kinds import kind_of
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.weight_plan import Entry, Step

# Storage [inputs, outputs] -> [outputs, inputs] of the same numbers.
FLOAT = "columns"
BY_OUTPUT = {"pack_columns": "pack_signed_rows", FLOAT: "rows"}


def join_matmul(work: ModelAndPlan) -> bool:
    """Join the projections of each module that read the same value and whose weights are computed alike.

    Matrices in 16 bits that have none to join are stored by outputs all the same.
    """
    siblings: dict[tuple[str, ir.Value | None, tuple[Step, ...]], list[ir.Node]] = {}
    for node in work.nodes("MatMul"):
        weights = _weights(work, node)
        if weights:
            module = node.metadata_props[SCOPE].rpartition(".")[0]
            siblings.setdefault((module, node.inputs[0], weights[0].steps), []).append(node)
    groups = [nodes for (*_, steps), nodes in siblings.items() if len(nodes) > 1 or steps[-1].name == FLOAT]
    for nodes in groups:
        if len(nodes) > 1:
            _join(work, nodes)
        else:
            build = tape.Tape()
            nodes[0].replace_input_with(1, _by_output(build, work, nodes))
            work.graph.insert_before(nodes[0], _scoped(build, nodes[0].metadata_props[SCOPE]))
    return bool(groups)


def _weights(work: ModelAndPlan, node: ir.Node) -> tuple[Entry, ...]:
    """The matrix that a product multiplies by: codes and what scales them, or values; () where it is no weight."""
    quantized, number = find_quantized(work, node.inputs[1]), find_float(work, node.inputs[1])
    if quantized is not None:
        return quantized.codes, quantized.scales
    if number is not None:
        return number.entries
    entry = work.entry_of(node.inputs[1])
    narrow = entry is not None and kind_of(entry.weight).quantized  # a router stays in float32
    return (entry,) if entry is not None and narrow and entry.steps[-1].name == FLOAT else ()


def _join(work: ModelAndPlan, nodes: Sequence[ir.Node]) -> None:
    sizes = [_outputs(_weights(work, node)[0]) for node in nodes]
    build = tape.Tape()
    product = build.op("MatMul", [nodes[0].inputs[0], _by_output(build, work, nodes)])
    for node, part in zip(nodes, _split(build, work, product, sizes), strict=True):
        node.outputs[0].replace_all_uses_with(part)
    work.graph.insert_before(nodes[0], _scoped(build, nodes[0].metadata_props[SCOPE].rpartition(".")[0]))
    work.graph.remove(nodes, safe=True)  # what made their matrices is cleaned up later


def _by_output(build: tape.Tape, work: ModelAndPlan, nodes: Sequence[ir.Node]) -> ir.Value:
    """The matrices of all nodes beside each other, [inputs, outputs], stored as one, [outputs, inputs]."""
    quantized, number = find_quantized(work, nodes[0].inputs[1]), find_float(work, nodes[0].inputs[1])
    stored = zip(*(_weights(work, node) for node in nodes), strict=True)
    weights = [work.merge_weights(entries, _joined(entries)) for entries in stored]
    if number is not None:
        return write_float(build, work, *weights)
    if quantized is not None:
        weights = [build.op("DequantizeLinear", weights, {"axis": 1, "block_size": quantized.group_size})]
    return build.op("Transpose", weights, {"perm": [1, 0]})


def _scoped(build: tape.Tape, scope: str) -> Sequence[ir.Node]:
    """What was built, as part of a module."""
    for node in build.nodes:
        node.metadata_props[SCOPE] = scope
    return build.nodes


def _split(build: tape.Tape, work: ModelAndPlan, product: ir.Value, sizes: list[int]) -> Sequence[ir.Value]:
    """[B, S, sum of sizes] -> [B, S, size] each."""

    def ints(*numbers: int) -> ir.Value:
        return work.constant(ir.tensor(np.array(numbers), name="list_" + "_".join(map(str, numbers))))

    columns = math.gcd(*sizes)
    counts = [size // columns for size in sizes]
    equal = build.op("Reshape", [product, ints(0, 0, sum(counts), columns)])
    parts = build.op_multi_out("Split", [equal, ints(*counts)], {"axis": -2}, num_outputs=len(sizes))
    return [build.op("Reshape", [part, ints(0, 0, size)]) for part, size in zip(parts, sizes, strict=True)]


def _joined(entries: Sequence[Entry]) -> Entry:
    """One entry [outputs, …] of the rows of all, in order."""
    first, layout = entries[0], entries[0].steps[-1]
    rest = first.shape[:1] if layout.name in BY_OUTPUT else first.shape[1:]
    return dataclasses.replace(
        first.with_layout(dataclasses.replace(layout, name=BY_OUTPUT.get(layout.name, layout.name))),
        name="+".join(entry.name for entry in entries),
        shape=(sum(map(_outputs, entries)), *rest),
        pieces=tuple(piece for entry in entries for piece in entry.pieces),
        weight="+".join(entry.weight for entry in entries),
        parameters=sum(entry.parameters for entry in entries),
        cut="rows",
        cut_multiple=1,
    )


def _outputs(entry: Entry) -> int:
    return sum(piece.shape[0] for piece in entry.pieces)
