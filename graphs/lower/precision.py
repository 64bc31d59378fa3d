"""Float32 graph and plan -> strongly typed 16 bit, with Casts where a value passes from one type to the other.

For what runs on GPUs: engines of TensorRT, and ONNX Runtime's CUDA provider.

Kept in float32, because a 16-bit type would be wrong rather than coarse there:
  angles and temperature     positions beyond 2048 are no float16 numbers
  residual stream and norms  the published models are trained in bf16, whose range float16 does not have
  rotation, norm of q and k  computed in float32 by the reference, too
  router                     a tie decides which expert runs

Everything that costs bandwidth (matrices, their inputs, the caches) has 16 bits. Neither backend picks a type itself. In an
engine a Cast between two pointwise operators costs nothing, because it fuses with them.
"""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from corral.exporter.capture import SCOPE
from corral.exporter.planned_tensor import ONNX_TYPE, replace_initializer
from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec import graph_io
from corral.spec.target import target_named
from corral.spec.weight_plan import step

FLOAT = ir.DataType.FLOAT
COMPUTED = (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # FP8 is storage: only QuantizeLinear makes it
WIDE_OPS = frozenset({"RMSNormalization", "RotaryEmbedding", "TopK"})
# The decoder itself (angles, choice of rows), a layer itself (residual sums), norms, routers.
WIDE_SCOPES = re.compile(r"|layers\.\d+|.*norm|.*\.router")
NO_FLOAT = frozenset(
    {"Shape", "Equal", "LessOrEqual", "QuantizeLinear"}
)  # operators whose result is no float though an input may be


def lower_precision(work: ModelAndPlan) -> bool:
    """Type the whole graph. Of its inputs and outputs the caches alone change their type: to the target's."""
    name = target_named(work.recipe.target).kv_dtype
    narrow = ONNX_TYPE[name]
    _narrow_weights(work, name)
    types = _Types(work.graph)
    for value in work.graph.inputs:
        if graph_io.is_cache(value.name or ""):
            value.type = ir.TensorType(narrow)
    for node in list(work.graph):
        wanted = FLOAT if _is_wide(node) else narrow
        for i, operand in enumerate(node.inputs):
            if operand is not None and types.of(operand) not in (None, wanted):
                node.replace_input_with(i, types.cast(operand, wanted, node))
        types.note_outputs(node, wanted)
    for i, value in enumerate(work.graph.outputs):
        if graph_io.is_cache(value.name or ""):
            value.type = ir.TensorType(narrow)
        elif types.of(value) != FLOAT:
            work.graph.outputs[i] = _widened(value)
    return True


def _is_wide(node: ir.Node) -> bool:
    return node.op_type in WIDE_OPS or WIDE_SCOPES.fullmatch(node.metadata_props.get(SCOPE, "")) is not None


def _narrow_weights(work: ModelAndPlan, dtype: str) -> None:
    """Store in `dtype` each float32 weight and constant that no float32 operator reads."""
    for name, value in list(work.graph.initializers.items()):
        if value.dtype != FLOAT or not value.uses() or any(_is_wide(use.node) for use in value.uses()):
            continue
        entry = work.plan.entries.get(name)
        if entry is not None:
            last = entry.steps[-1]
            narrow = dataclasses.replace(entry.with_layout(step(last.name, dtype=dtype)), dtype=dtype)
            replace_initializer(work.graph, value, narrow)
            work.plan.replace(entry.name, narrow)
        else:
            assert value.const_value is not None
            number = value.const_value.numpy().astype(ONNX_TYPE[dtype].numpy())
            value.const_value, value.type = ir.tensor(number, name=name), ir.TensorType(ONNX_TYPE[dtype])


def _widened(output: ir.Value) -> ir.Value:
    """A float32 graph output in the place of a narrow one, under its name."""
    producer = output.producer()
    assert producer is not None and producer.graph is not None
    cast = ir.node("Cast", [output], {"to": FLOAT}, metadata_props=dict(producer.metadata_props))
    producer.graph.insert_after(producer, cast)
    (wide,) = cast.outputs
    wide.name, wide.type, wide.shape = output.name, ir.TensorType(FLOAT), output.shape
    output.name, output.shape = f"{output.name}.narrow", None
    return wide


class _Types:
    """The type of each floating-point value so far, and the Casts that exist."""

    def __init__(self, graph: ir.Graph) -> None:
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value) -> ir.DataType | None:
        """None where it is no floating-point type that is computed in."""
        if value.is_graph_input() or value.is_initializer():
            return value.dtype if value.dtype in COMPUTED else None
        return self._types.get(value)

    def note_outputs(self, node: ir.Node, compute: ir.DataType) -> None:
        if node.op_type == "Cast":
            compute = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type in NO_FLOAT or not any(value and self.of(value) for value in node.inputs):
            return
        if compute in COMPUTED:  # of TopK's outputs the second is no float
            for output in node.outputs if node.op_type == "Split" else node.outputs[:1]:
                self._types[output] = compute

    def cast(self, value: ir.Value, to: ir.DataType, user: ir.Node) -> ir.Value:
        """`value` as `to`, by one Cast however many use it, placed before the first."""
        if (value, to) not in self._casts:
            scope = user.metadata_props.get(SCOPE, "")
            node = ir.node("Cast", [value], {"to": to}, metadata_props={SCOPE: scope})
            assert user.graph is not None
            user.graph.insert_before(user, node)
            self._casts[value, to] = node.outputs[0]
            self._types[node.outputs[0]] = to
        return self._casts[value, to]
