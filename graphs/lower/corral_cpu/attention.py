"""corral::RopeAttention, corral::NopeAttention -> corral.cpu::Attention on the joined product of q, k and v.

    query, key, value = Split(qkv)     ->  Attention(qkv, past_key, past_value, past_length, cos, sin, temperature)
    RopeAttention(query, key, value, …)

Where rules store q, k and v differently, so that their product is not one, they are concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.ops.attention import NOPE, ROPE
from corral.exporter.ops.custom_op import DOMAIN
from corral.graphs.lower.corral_cpu.stored import import_kernels
from corral.graphs.lower.onnxruntime import attention as onnxruntime_attention
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent, made_by
from corral.spec import cpu_ops, graph_io
from corral.spec.errors import InputError
from corral.spec.kv_layout import KV_GROUPS, stored_kv_layouts

# How the KV cache is stored -> the operator.
ATTENTION = {"float32": "Attention", "int8": "AttentionInt8", "int4": "AttentionInt4"}


def lower_attention(work: ModelAndPlan) -> bool:
    """Lower every attention layer, or leave all to ONNX Runtime where heads are no whole lanes; after `merge_matmul`.

    Raises PatternAbsent unless there is one per decoder layer.
    """
    head_dim, kv = work.config.head_dim, work.recipe.kv_dtype
    if not cpu_ops.attends(head_dim, KV_GROUPS.get(kv)):
        if kv not in KV_GROUPS:
            return onnxruntime_attention.lower_attention(work)
        raise InputError(
            f"attention heads are {head_dim} wide; corral's CPU kernels take a KV cache in {kv} of heads up to "
            f"{cpu_ops.LARGEST_HEAD} in whole groups of {KV_GROUPS[kv]}. Use --kv float."
        )
    nodes = [*work.nodes(ROPE, DOMAIN), *work.nodes(NOPE, DOMAIN)]
    if len(nodes) != work.config.num_layers:
        raise PatternAbsent(f"lower_attention found {len(nodes)} layers, expected {work.config.num_layers}")
    import_kernels(work)
    for node in nodes:
        query, key, value, past_key, past_value, past_length, *by_token = node.inputs
        positions = [*by_token, None] if node.op_type == ROPE else [None, None, *(by_token or [None])]
        build = tape.Tape()
        qkv = _joined(build, [query, key, value])
        outputs = build.op_multi_out(
            ATTENTION[kv],
            [qkv, past_key, past_value, past_length, *positions],
            {
                "num_heads": node.attributes["num_heads"].as_int(),
                "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
                "qk_norm_epsilon": node.attributes["qk_norm_epsilon"].as_float() if node.op_type == ROPE else 0.0,
            },
            domain=cpu_ops.DOMAIN,
            num_outputs=3,
        )
        work.replace_node(node, build.nodes, list(outputs))
    _store_caches(work)
    return True


def _store_caches(work: ModelAndPlan) -> None:
    """Give the graph's caches the type and the width that the recipe stores them in."""
    layout = stored_kv_layouts(work.config, work.recipe)[0]
    for value in (*work.graph.inputs, *work.graph.outputs):
        if graph_io.is_cache(value.name or ""):
            assert value.shape is not None
            value.type = ir.TensorType(ir.DataType.FLOAT if layout.array_dtype == "float32" else ir.DataType.UINT8)
            value.shape = ir.Shape([*value.shape[:3], layout.row_items])


def _joined(build: tape.Tape, parts: Sequence[ir.Value | None]) -> ir.Value:
    """The value that `parts` are all of, split in this order, or their concatenation."""
    split = made_by(parts[0], "Split")
    if split is not None and list(split.outputs) == list(parts):
        assert split.inputs[0] is not None
        return split.inputs[0]
    return build.op("Concat", list(parts), {"axis": -1})
