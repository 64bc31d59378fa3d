"""MatMul of one value by q, k and v (or gate and up) -> one MatMul and a Split: the builder stores each weight once.

    MatMul(x, W_q), MatMul(x, W_k), MatMul(x, W_v)  ->  Split(MatMul(x, Transpose(W_qkv)))

In a prefill the builder joins such products by itself, in a decode step it does not, and an engine of both profiles then
held the matrices twice. The joined matrix is stored [outputs, inputs], rows after rows, because that is how pieces of
several tensors become one; the builder folds the Transpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.weight_plan import Entry, Step

# Storage [inputs, outputs] -> [outputs, inputs] of the same numbers.
BY_OUTPUT = {"pack_columns": "pack_signed_rows", "columns": "rows"}


def join_matmul(work: ModelAndPlan) -> bool:
    """Join the projections of each module that read the same value and whose weights are computed alike."""
    siblings: dict[tuple[str, ir.Value | None, tuple[Step, ...]], list[ir.Node]] = {}
    for node in work.nodes("MatMul"):
        weights = _weights(work, node)
        if weights:
            module = node.metadata_props[SCOPE].rpartition(".")[0]
            siblings.setdefault((module, node.inputs[0], weights[0].steps), []).append(node)
    groups = [nodes for nodes in siblings.values() if len(nodes) > 1]
    for nodes in groups:
        _join(work, nodes)
    return bool(groups)


def _weights(work: ModelAndPlan, node: ir.Node) -> tuple[Entry, ...]:
    """The matrix that a product multiplies by, [inputs, outputs]: codes and scales, or values; () where it is no weight."""
    quantized = find_quantized(work, node.inputs[1])
    if quantized is not None:
        return quantized.codes, quantized.scales
    entry = work.entry_of(node.inputs[1])
    return (entry,) if entry is not None and entry.steps[-1].name in BY_OUTPUT else ()


def _join(work: ModelAndPlan, nodes: Sequence[ir.Node]) -> None:
    stored = [_weights(work, node) for node in nodes]
    quantized = [find_quantized(work, node.inputs[1]) for node in nodes]
    weights = [work.merge_weights(entries, _joined(entries)) for entries in zip(*stored, strict=True)]
    build = tape.Tape()
    if quantized[0] is not None:
        weights = [build.op("DequantizeLinear", weights, {"axis": 1, "block_size": quantized[0].group_size})]
    product = build.op("MatMul", [nodes[0].inputs[0], build.op("Transpose", weights, {"perm": [1, 0]})])
    sizes = [entries[0].shape[1] for entries in stored]
    lengths = work.constant(ir.tensor(np.array(sizes), name="split_" + "_".join(map(str, sizes))))
    parts = build.op_multi_out("Split", [product, lengths], {"axis": -1}, num_outputs=len(nodes))
    for node in build.nodes:
        node.metadata_props[SCOPE] = nodes[0].metadata_props[SCOPE].rpartition(".")[0]
    for node, part in zip(nodes, parts, strict=True):
        node.outputs[0].replace_all_uses_with(part)
    work.graph.insert_before(nodes[0], build.nodes)
    work.graph.remove([*nodes, *(weight.dequantize for weight in quantized if weight is not None)], safe=True)


def _joined(entries: Sequence[Entry]) -> Entry:
    """One entry [outputs, inputs] of the rows of all, in order."""
    first, layout = entries[0], entries[0].steps[-1]
    return dataclasses.replace(
        first.with_layout(dataclasses.replace(layout, name=BY_OUTPUT[layout.name])),
        name="+".join(entry.name for entry in entries),
        shape=(sum(entry.shape[1] for entry in entries), first.shape[0]),
        pieces=tuple(piece for entry in entries for piece in entry.pieces),
        weight="+".join(entry.weight for entry in entries),
        parameters=sum(entry.parameters for entry in entries),
        cut="rows",
        cut_multiple=1,
    )
