"""MatMul(x, DequantizeLinear(codes, scales)) -> corral.cpu::Int4MatMul(x, codes, scales), where codes have 4 bits.

Where a recipe's rule stores a matrix in 8, it is left to ONNX Runtime's kernel.
"""

from __future__ import annotations

from onnx_ir import tape

from corral.graphs.lower.corral_cpu.stored import import_kernels, store_tiles
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.cpu_ops import DOMAIN

MATMUL, BITS = "Int4MatMul", 4


def lower_int4_matmul(work: ModelAndPlan) -> bool:
    """Lower every matrix product with an int4 weight; returns whether there was one."""
    import_kernels(work)
    changed = False
    for node in work.nodes("MatMul"):
        weight = find_quantized(work, node.inputs[1])
        if weight is not None and weight.bits == BITS:
            build = tape.Tape()
            y = build.op(MATMUL, [node.inputs[0], *store_tiles(work, weight)], domain=DOMAIN)
            work.replace_node(node, build.nodes, [y])
            changed = True
    return changed
