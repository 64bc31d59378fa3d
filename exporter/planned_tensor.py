"""A plan entry as an ONNX initializer that holds no data: type and shape now, bytes when the plan is executed."""

from __future__ import annotations

from typing import NoReturn

import onnx_ir as ir

from corral.spec.weight_plan import Entry

ONNX_TYPE = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float4e2m1": ir.DataType.FLOAT4E2M1,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
}


def planned_initializer(entry: Entry) -> ir.Value:
    """A graph initializer for `entry`."""

    def unread() -> NoReturn:
        raise AssertionError(f"the bytes of {entry.name} were asked for before the plan was executed")

    dtype, shape = ONNX_TYPE[entry.dtype], ir.Shape(entry.shape)
    tensor = ir.LazyTensor(unread, dtype=dtype, shape=shape, name=entry.name)
    return ir.Value(name=entry.name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)


def replace_initializer(graph: ir.Graph, old: ir.Value, entry: Entry) -> ir.Value:
    """Put `entry`'s initializer where `old` was, for all its uses."""
    new = planned_initializer(entry)
    old.replace_all_uses_with(new)
    assert old.name is not None
    del graph.initializers[old.name]
    graph.register_initializer(new)
    return new
