"""MatMul(x, DequantizeLinear(codes, scales)) -> corral.cpu::Int4MatMul(x, codes, scales)."""

from __future__ import annotations

from onnx_ir import tape

from corral.graphs.lower.corral_cpu.stored import import_kernels, store_tiles
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec.cpu_ops import DOMAIN

MATMUL = "Int4MatMul"


def lower_int4_matmul(work: ModelAndPlan) -> bool:
    """Lower every matrix product with a quantized weight. Raises PatternAbsent where a dequantized weight is left."""
    import_kernels(work)
    for node in work.nodes("MatMul"):
        weight = find_quantized(work, node.inputs[1])
        if weight is not None:
            build = tape.Tape()
            y = build.op(MATMUL, [node.inputs[0], *store_tiles(work, weight)], domain=DOMAIN)
            work.replace_node(node, build.nodes, [y])
    if left := [node.name for node in work.nodes("DequantizeLinear") if node.outputs[0].uses()]:
        raise PatternAbsent(f"{len(left)} dequantized weights are not multiplied by MatMul, {left[0]} first")
    return True
