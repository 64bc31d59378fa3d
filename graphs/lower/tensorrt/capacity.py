"""Caches [batch, heads, capacity_<class>, head dim] -> of a fixed number of rows, the recipe's `max_context` or a chunk.

TensorRT's cache update asks for it: "the KV cache tensor must have a static sequence length dimension".
"""

from __future__ import annotations

import onnx_ir as ir

from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec import graph_io
from corral.spec.kv_layout import stored_kv_layouts


def fix_capacity(work: ModelAndPlan) -> bool:
    """Give every cache input and output its number of rows."""
    rows = {
        name(layer): layout.fixed_rows
        for layout in stored_kv_layouts(work.config, work.recipe)
        for layer in layout.layers
        for name in (graph_io.past_key, graph_io.past_value, graph_io.present_key, graph_io.present_value)
    }
    for value in (*work.graph.inputs, *work.graph.outputs):
        if value.name in rows:
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:2], rows[value.name], value.shape[3]])
    return True
