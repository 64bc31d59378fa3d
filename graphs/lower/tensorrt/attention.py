"""corral::RopeAttention, corral::NopeAttention -> RotaryEmbedding, TensorScatter into the cache, Attention over all of it.

    query, key -> split heads -> RotaryEmbedding -> RMSNormalization --+      (rope layers)
    query -> Mul temperature -> split heads ---------------------------+      (nope layers)
                                                                       v
    present = TensorScatter(past, new rows, past_length);  Attention(query, present_key, present_value, visible)

TensorRT turns TensorScatter into its in-place cache update, and one Attention with grouped heads and one output into its
fused kernel. Attention's own past and present are refused by its parser; so is a cache that grows by concatenation.
`visible` [B, 1, S, C] is the same for all layers of a KV class and computed once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.ops.attention import NOPE, ROPE
from corral.exporter.ops.custom_op import DOMAIN
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.spec import graph_io


def lower_attention(work: ModelAndPlan) -> bool:
    """Lower every attention layer. Raises PatternAbsent unless there is one per decoder layer."""
    nodes = [node for node in list(work.graph) if node.domain == DOMAIN and node.op_type in (ROPE, NOPE)]
    if len(nodes) != work.config.num_layers:
        raise PatternAbsent(f"lower_attention found {len(nodes)} layers, expected {work.config.num_layers}")
    visible: dict[ir.Value, ir.Value] = {}  # past_length, one per KV class -> its mask
    for node in nodes:
        build = tape.Tape()
        past_length = node.inputs[5]
        assert past_length is not None
        if past_length not in visible:
            visible[past_length] = _visible_rows(build, work, node)
        outputs = _attention(build, work, node, visible[past_length])
        work.replace_node(node, build.nodes, outputs)
    return True


def _attention(build: tape.Tape, work: ModelAndPlan, node: ir.Node, visible: ir.Value) -> list[ir.Value]:
    query, key, value, past_key, past_value, past_length, *optional = node.inputs
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    if node.op_type == NOPE and optional:  # the temperature [B, S] multiplies what is [B, S, heads * D] still
        last = work.constant(ir.tensor(np.array([-1]), name="last_axis"))
        query = build.op("Mul", [query, build.op("Unsqueeze", [optional[0], last])])
    query, key, value = (
        _split_heads(build, work, x, count) for x, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if node.op_type == ROPE:
        epsilon = node.attributes["qk_norm_epsilon"].as_float()
        query, key = (_rotate_and_norm(build, work, x, optional, epsilon) for x in (query, key))
    scatter = {"axis": 2}
    present_key = build.op("TensorScatter", [past_key, key, past_length], scatter)
    present_value = build.op("TensorScatter", [past_value, value, past_length], scatter)
    attended = build.op("Attention", [query, present_key, present_value, visible])
    flat = work.constant(ir.tensor(np.array([0, 0, heads * work.config.head_dim]), name="merge_heads"))
    merged = build.op("Transpose", [attended], {"perm": [0, 2, 1, 3]})
    return [build.op("Reshape", [merged, flat]), present_key, present_value]


def _split_heads(build: tape.Tape, work: ModelAndPlan, x: ir.Value | None, heads: int) -> ir.Value:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    shape = work.constant(ir.tensor(np.array([0, 0, heads, work.config.head_dim]), name=f"split_{heads}_heads"))
    return build.op("Transpose", [build.op("Reshape", [x, shape])], {"perm": [0, 2, 1, 3]})


def _rotate_and_norm(
    build: tape.Tape, work: ModelAndPlan, x: ir.Value, angles: list[ir.Value | None], epsilon: float
) -> ir.Value:
    rotated = build.op("RotaryEmbedding", [x, *angles], {"interleaved": 1})
    if not epsilon:
        return rotated
    ones = work.constant(ir.tensor(np.ones(work.config.head_dim, np.float32), name="ones_head_dim"))
    return build.op("RMSNormalization", [rotated, ones], {"epsilon": epsilon, "axis": -1})


def _visible_rows(build: tape.Tape, work: ModelAndPlan, node: ir.Node) -> ir.Value:
    """visible [B, 1, S, C]: cache row c <= past_length[b] + s."""
    past_key, past_length = node.inputs[3], node.inputs[5]
    assert past_key is not None and past_key.shape is not None
    rows = past_key.shape[2]
    if not isinstance(rows, int):
        raise PatternAbsent(f"the cache {past_key.name} has no fixed number of rows: run fix_capacity before")
    capacity = work.constant(ir.tensor(np.array(rows), name=f"capacity_{rows}"))
    # Tokens are counted by positions, not by anything made of embeddings: a later stage computes the mask anew.
    positions = next(value for value in work.graph.inputs if value.name == graph_io.POSITIONS)
    zero, one = (work.constant(ir.tensor(np.array(i), name=name)) for i, name in ((0, "zero"), (1, "one")))
    column = work.constant(ir.tensor(np.array([1]), name="one_axis"))
    front = work.constant(ir.tensor(np.array([1, 2, 3]), name="front_axes"))
    tokens = build.op("Squeeze", [build.op("Shape", [positions], {"start": 1, "end": 2})])
    token = build.op("Unsqueeze", [build.op("Range", [zero, tokens, one]), column])
    own_row = build.op("Add", [build.op("Unsqueeze", [past_length, front]), token])
    return build.op("LessOrEqual", [build.op("Range", [zero, capacity, one]), own_row])
