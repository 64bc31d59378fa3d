"""MatMul(x, DequantizeLinear(codes, scales)) -> corral.cpu::TiledMatMul(x, codes, scales), with zero points if any."""

from __future__ import annotations

from onnx_ir import tape

from corral.graphs.lower.corral_cpu.stored import import_kernels, store_tiles
from corral.graphs.model_and_plan import ModelAndPlan
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.cpu_ops import DOMAIN

MATMUL = "TiledMatMul"


def lower_matmul(work: ModelAndPlan) -> bool:
    """Lower every matrix product with a quantized weight; returns whether there was one."""
    import_kernels(work)
    changed = False
    for node in work.nodes("MatMul"):
        weight = find_quantized(work, node.inputs[1])
        if weight is not None:
            build = tape.Tape()
            y = build.op(MATMUL, [node.inputs[0], *store_tiles(work, weight)], {"bits": weight.bits}, domain=DOMAIN)
            work.replace_node(node, build.nodes, [y])
            changed = True
    return changed
