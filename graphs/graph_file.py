"""A lowered graph and its plan -> the bytes of an ONNX file whose weights lie in shards beside it, and of the plan's own."""

from __future__ import annotations

import json
from collections.abc import Mapping

import onnx_ir as ir

from corral.exporter.planned_tensor import ONNX_TYPE
from corral.graphs.execute.shards import shard_name
from corral.spec.weight_plan import Placement, WeightPlan


def graph_bytes(model: ir.Model, plan: WeightPlan, placements: Mapping[str, Placement]) -> bytes:
    """Serialize the graph with planned weights as external data at their placements. The same input, the same bytes."""
    planned = {}
    for name, initializer in model.graph.initializers.items():
        entry = plan.entries.get(name)
        if entry is None:
            continue
        planned[name] = initializer.const_value
        place = placements[name]
        initializer.const_value = ir.ExternalTensor(
            shard_name(place.shard),
            place.offset,
            place.nbytes,
            ONNX_TYPE[entry.dtype],
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir="",
        )
    try:
        proto = ir.to_proto(model)
        order = {name: i for i, name in enumerate(plan.entries)}
        proto.graph.initializer.sort(key=lambda tensor: (order.get(tensor.name, len(order)), tensor.name))
        del proto.graph.value_info[:]  # inferred again wherever the graph is read
        return proto.SerializeToString(deterministic=True)
    finally:
        for name, tensor in planned.items():
            model.graph.initializers[name].const_value = tensor


def plan_bytes(plan: WeightPlan) -> bytes:
    """The plan as JSON. The same input, the same bytes."""
    return json.dumps(plan.to_json(), separators=(",", ":")).encode()
