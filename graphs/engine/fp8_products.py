"""Whether an engine multiplies FP8 with FP8 wherever its graph has an FP8 matrix, by what its kernels read.

A matrix may stay FP8 in the engine and still be multiplied in float16: where the node that rounds its other operand is
missing, or where something stands between codes and product. Neither its bytes nor its type would show that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from corral.graphs.engine.schedule import Kernel, Schedule
from corral.spec.errors import CheckFailed

FP8 = "fp8_e4m3"  # the schedule's word


def fp8_products(graph: Any) -> tuple[str, ...]:
    """The names of an onnx.GraphProto's MatMul nodes that a matrix in FP8 reaches, stored so or rounded, in its order."""
    import onnx

    users = defaultdict(list)
    for node in graph.node:
        for name in node.input[:1] if node.op_type == "DequantizeLinear" else node.input:  # its second are scales
            users[name].append(node)
    float8 = onnx.TensorProto.FLOAT8E4M3FN
    reached = {tensor.name for tensor in graph.initializer if tensor.data_type == float8 and len(tensor.dims) > 1}
    reached |= {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.output}
    found, left = set(), list(reached)
    while left:
        for node in users[left.pop()]:
            if node.op_type == "MatMul":
                found.add(node.name)
            else:
                new = set(node.output) - reached
                reached |= new
                left += new
    return tuple(node.name for node in graph.node if node.name in found)


def check_fp8_products(out: Path, schedule: Schedule, products: Iterable[str]) -> None:
    """Raise CheckFailed unless the kernel of each product reads two FP8 operands."""
    kernels = {layer: kernel for kernel in schedule.kernels for layer in kernel.layers}
    for name in products:
        read = _types(kernels.get(name))
        if read.count(FP8) < 2:
            raise CheckFailed(
                f"{out.name} multiplies {name} of {', '.join(read) or 'nothing that its schedule names'}, expected two "
                f"operands of {FP8}: the builder fell back to another type. The engine is not kept."
            )


def _types(kernel: Kernel | None) -> list[str]:
    """Of what a kernel reads, scalars apart (factors of the sum, sizes)."""
    return [operand.type for operand in kernel.reads if operand.shape != (1,)] if kernel else []
