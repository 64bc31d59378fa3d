"""MatMul of one value by q, k and v (or gate and up) -> one MatMul and a Split: the builder stores each weight once.

    MatMul(x, W_q), MatMul(x, W_k), MatMul(x, W_v)  ->  Split(MatMul(x, Transpose(W_qkv)))

In a prefill the builder joins such products by itself, in a decode step it does not, and an engine of both profiles then
held the matrices twice. The joined matrix is stored [outputs, inputs], rows after rows, because that is how pieces of
several tensors become one; the builder folds the Transpose. FP8 is stored so in any case, and what it multiplies with is
then rounded once for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.fp8_weight import find_fp8, write_fp8
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
    """The matrix that a product multiplies by: codes and scales or gains, or values; () where it is no weight."""
    quantized, fp8 = find_quantized(work, node.inputs[1]), find_fp8(work, node.inputs[1])
    if quantized is not None:
        return quantized.codes, quantized.scales
    if fp8 is not None:
        return fp8.codes, fp8.gains
    entry = work.entry_of(node.inputs[1])
    return (entry,) if entry is not None and entry.steps[-1].name in BY_OUTPUT else ()


def _join(work: ModelAndPlan, nodes: Sequence[ir.Node]) -> None:
    stored = [_weights(work, node) for node in nodes]
    quantized, fp8 = find_quantized(work, nodes[0].inputs[1]), find_fp8(work, nodes[0].inputs[1])
    weights = [work.merge_weights(entries, _joined(entries)) for entries in zip(*stored, strict=True)]
    build = tape.Tape()
    if fp8 is not None:
        matrix = write_fp8(build, work, *weights)
    else:
        if quantized is not None:
            weights = [build.op("DequantizeLinear", weights, {"axis": 1, "block_size": quantized.group_size})]
        matrix = build.op("Transpose", weights, {"perm": [1, 0]})
    product = build.op("MatMul", [nodes[0].inputs[0], matrix])
    sizes = [_outputs(entries[0]) for entries in stored]
    lengths = work.constant(ir.tensor(np.array(sizes), name="split_" + "_".join(map(str, sizes))))
    parts = build.op_multi_out("Split", [product, lengths], {"axis": -1}, num_outputs=len(nodes))
    for node in build.nodes:
        node.metadata_props[SCOPE] = nodes[0].metadata_props[SCOPE].rpartition(".")[0]
    for node, part in zip(nodes, parts, strict=True):
        node.outputs[0].replace_all_uses_with(part)
    work.graph.insert_before(nodes[0], build.nodes)
    work.graph.remove(nodes, safe=True)  # what made their matrices is cleaned up later


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
