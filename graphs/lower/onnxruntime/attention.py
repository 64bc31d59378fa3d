"""corral::RopeAttention, corral::NopeAttention -> com.microsoft.GroupQueryAttention on a cache that past and present share.

    query, key -> RotaryEmbedding -> RMSNormalization -+      (rope layers)
    query -> Mul temperature --------------------------+      (nope layers)
                                                       v
    GroupQueryAttention(query, key, value, past_key, past_value, past_length + S - 1, max of it + 1)

GroupQueryAttention takes one scalar scale, so the temperature multiplies the queries before it; its own rotation wants a
table as long as the context, so the rotation of just these positions stays outside.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.ops.attention import NOPE, ROPE
from corral.exporter.ops.custom_op import DOMAIN
from corral.graphs.lower.onnxruntime.contrib import CONTRIB, import_contrib
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.spec import graph_io


def lower_attention(work: ModelAndPlan) -> bool:
    """Lower every attention layer. Raises PatternAbsent unless there is one per decoder layer."""
    nodes = [*work.nodes(ROPE, DOMAIN), *work.nodes(NOPE, DOMAIN)]
    if len(nodes) != work.config.num_layers:
        raise PatternAbsent(f"lower_attention found {len(nodes)} layers, expected {work.config.num_layers}")
    import_contrib(work)
    for node in nodes:
        build = tape.Tape()
        new_outputs = _group_query_attention(build, work, node)
        work.replace_node(node, build.nodes, new_outputs)
    return True


def _group_query_attention(build: tape.Tape, work: ModelAndPlan, node: ir.Node) -> list[ir.Value]:
    query, key, value, past_key, past_value, past_length, *optional = node.inputs
    assert query and key and value and past_key and past_value and past_length
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    if node.op_type == ROPE:
        cos, sin = optional
        query = _rotate_and_norm(build, work, node, query, heads, cos, sin)
        key = _rotate_and_norm(build, work, node, key, kv_heads, cos, sin)
    elif optional:
        last = work.constant(ir.tensor(np.array([-1]), name="last_axis"))
        query = build.op("Mul", [query, build.op("Unsqueeze", [optional[0], last])])
    last_row = _last_row(build, work, past_length)
    one = work.constant(ir.tensor(np.array(1, np.int32), name="one_int32"))
    total = build.op("Add", [build.op("ReduceMax", [last_row], {"keepdims": 0}), one])
    return list(
        build.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, last_row, total],
            {"num_heads": heads, "kv_num_heads": kv_heads},
            domain=CONTRIB,
            num_outputs=3,
        )
    )


def _last_row(build: tape.Tape, work: ModelAndPlan, past_length: ir.Value) -> ir.Value:
    """The cache row of the last new token, int32 [B]: what the operator calls seqlens_k. One for all layers of a class."""
    positions = next(value for value in work.graph.inputs if value.name == graph_io.POSITIONS)
    tokens = build.op("Shape", [positions], {"start": 1, "end": 2})
    one = work.constant(ir.tensor(np.array([1]), name="one_1d"))
    last = build.op("Sub", [build.op("Add", [past_length, tokens]), one])
    return build.op("Cast", [last], {"to": ir.DataType.INT32})


def _rotate_and_norm(
    build: tape.Tape,
    work: ModelAndPlan,
    node: ir.Node,
    x: ir.Value,
    heads: int,
    cos: ir.Value | None,
    sin: ir.Value | None,
) -> ir.Value:
    rotated = build.op("RotaryEmbedding", [x, cos, sin], {"interleaved": 1, "num_heads": heads})
    epsilon = node.attributes["qk_norm_epsilon"].as_float()
    if not epsilon:
        return rotated
    dim = work.config.head_dim
    by_head = work.constant(ir.tensor(np.array([0, 0, heads, dim]), name=f"split_{heads}_heads"))
    flat = work.constant(ir.tensor(np.array([0, 0, heads * dim]), name=f"merge_{heads}_heads"))
    ones = work.constant(ir.tensor(np.ones(dim, np.float32), name="ones_head_dim"))
    normed = build.op("RMSNormalization", [build.op("Reshape", [rotated, by_head]), ones], {"epsilon": epsilon})
    return build.op("Reshape", [normed, flat])
