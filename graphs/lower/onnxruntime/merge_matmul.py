"""Products of one input by q, k and v (or gate and up) -> one product and a Split: fewer, larger products.

The stored rows of the matrices lie one after the other already, so merging is a matter of the plan: an entry with the
pieces of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.lower.onnxruntime.contrib import CONTRIB
from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec import cpu_ops
from corral.spec.weight_plan import Entry, Step

# (operator, domain) -> outputs in each row of its stored weight.
MERGEABLE = {("MatMulNBits", CONTRIB): 1, ("TiledMatMul", cpu_ops.DOMAIN): cpu_ops.TILE_OUTPUTS}


def merge_matmul(work: ModelAndPlan) -> bool:
    """Merge the quantized projections of each module that read the same value and are computed alike."""
    siblings: dict[tuple[str, ir.Value | None, tuple[Step, ...]], list[ir.Node]] = {}
    for op_type, domain in MERGEABLE:
        for node in work.nodes(op_type, domain):
            module, codes = node.metadata_props[SCOPE].rpartition(".")[0], work.entry_of(node.inputs[1])
            assert codes is not None
            siblings.setdefault((module, node.inputs[0], codes.steps), []).append(node)
    groups = [nodes for nodes in siblings.values() if len(nodes) > 1]
    for nodes in groups:
        _merge(work, nodes)
    return bool(groups)


def merge_stored(work: ModelAndPlan, nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The weights of several products as those of one: codes, scales and zero points if any, the rows of all in order."""
    weights = []
    for i in range(1, len(nodes[0].inputs)):
        entries = [entry for node in nodes if (entry := work.entry_of(node.inputs[i]))]
        weights.append(work.merge_weights(entries, _joined(entries)))
    return weights


def _merge(work: ModelAndPlan, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    outputs_a_row = MERGEABLE[first.op_type, first.domain]
    sizes = [entry.shape[0] * outputs_a_row for node in nodes if (entry := work.entry_of(node.inputs[1]))]
    weights = merge_stored(work, nodes)
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    if "N" in attributes:
        attributes["N"] = sum(sizes)
    build = tape.Tape()
    product = build.op(first.op_type, [first.inputs[0], *weights], attributes, domain=first.domain)
    lengths = work.constant(ir.tensor(np.array(sizes), name="split_" + "_".join(map(str, sizes))))
    parts = build.op_multi_out("Split", [product, lengths], {"axis": -1}, num_outputs=len(nodes))
    for node in build.nodes:
        node.metadata_props[SCOPE] = first.metadata_props[SCOPE].rpartition(".")[0]
    for node, part in zip(nodes, parts, strict=True):
        node.outputs[0].replace_all_uses_with(part)
    work.graph.insert_before(first, build.nodes)
    work.graph.remove(nodes, safe=True)


def _joined(entries: Sequence[Entry]) -> Entry:
    """One entry of the rows of all, in order."""
    first = entries[0]
    return dataclasses.replace(
        first,
        name="+".join(entry.name for entry in entries),
        shape=(sum(entry.shape[0] for entry in entries), *first.shape[1:]),
        pieces=tuple(piece for entry in entries for piece in entry.pieces),
        weight="+".join(entry.weight for entry in entries),
        parameters=sum(entry.parameters for entry in entries),
    )
