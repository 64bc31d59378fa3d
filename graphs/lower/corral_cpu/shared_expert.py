"""A MoE layer's routed and shared experts, at once: with few tokens, threads wait for each other longer than they compute.

Add(TiledFeedForward(x, shared), TiledExperts(x, router_logits, experts))  ->  corral.cpu::TiledMoE(x, …)
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.lower.corral_cpu.experts import EXPERTS
from corral.graphs.lower.corral_cpu.feed_forward import FEED_FORWARD, is_fused
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent, made_by
from corral.spec.cpu_ops import DOMAIN

MOE = "TiledMoE"


def join_shared_expert(work: ModelAndPlan) -> bool:
    """Join every shared expert that `fuse_feed_forward` fused. Raises PatternAbsent where one was not found."""
    expected = sum(layer.moe and is_fused(work, i, layer) for i, layer in enumerate(work.config.layers))
    joined = sum(_join(work, experts) for experts in work.nodes(EXPERTS, DOMAIN))
    if joined != expected:
        raise PatternAbsent(f"join_shared_expert joined {joined} shared experts, expected {expected}")
    return bool(joined)


def _join(work: ModelAndPlan, experts: ir.Node) -> bool:
    (add,) = experts.outputs[0].consumers()
    shared = next((node for value in add.inputs if (node := made_by(value, FEED_FORWARD))), None)
    if shared is None or shared.inputs[0] is not experts.inputs[0]:
        return False
    bits = {f"shared_{name}": shared.attributes[name].as_int() for name in ("gate_up_bits", "down_bits")}
    build = tape.Tape()
    y = build.op(
        MOE,
        [*experts.inputs[:6], *shared.inputs[1:5], *_zeros(experts.inputs[6:], shared.inputs[5:])],
        {name: attribute.as_int() for name, attribute in experts.attributes.items()} | bits,
        domain=DOMAIN,
    )
    work.replace_node(add, build.nodes, [y])
    work.graph.remove([experts, shared], safe=True)
    return True


def _zeros(experts: Sequence[ir.Value | None], shared: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Zero points of all four matrices, or nothing where there are none."""
    return [value for own in (experts, shared) for value in own or (None, None)] if experts or shared else []
