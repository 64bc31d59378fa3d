"""corral::MoE(x, router_logits, gate_up, down) -> corral.cpu::TiledExperts, which routes by itself, for any k."""

from __future__ import annotations

from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.exporter.ops.custom_op import DOMAIN
from corral.exporter.ops.moe import NAME
from corral.graphs.lower.corral_cpu.stored import import_kernels, store_tiles, two_matrices
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.quantized_weight import find_quantized
from corral.spec import cpu_ops
from corral.spec.errors import InputError

EXPERTS = "TiledExperts"


def lower_experts(work: ModelAndPlan) -> bool:
    """Lower every MoE layer. Raises PatternAbsent unless there is one node per MoE layer. Raises InputError for weights
    that are not quantized.
    """
    nodes = list(work.nodes(NAME, DOMAIN))
    expected = sum(layer.moe for layer in work.config.layers)
    if len(nodes) != expected:
        raise PatternAbsent(f"lower_experts found {len(nodes)} corral::MoE, expected {expected}")
    import_kernels(work)
    for node in nodes:
        x, logits, *weights = node.inputs
        gate_up, down = (find_quantized(work, weight) for weight in weights)
        if gate_up is None or down is None:
            raise InputError(
                f"the matrices of {node.metadata_props[SCOPE]} are not both quantized; corral's CPU kernels compute int4 "
                "and int8. Leave the rule for them out, or use --kernels stock."
            )
        build = tape.Tape()
        attributes = {"k": node.attributes["k"].as_int(), "gate_up_bits": gate_up.bits, "down_bits": down.bits}
        weights = two_matrices(store_tiles(work, gate_up), store_tiles(work, down))
        y = build.op(EXPERTS, [x, logits, *weights], attributes, domain=cpu_ops.DOMAIN)
        work.replace_node(node, build.nodes, [y])
    return bool(nodes)
