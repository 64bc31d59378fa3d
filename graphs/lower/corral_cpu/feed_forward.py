"""The SwiGLU feed-forward of dense layers and shared experts, fused: its inner values never leave the kernel.

gate = TiledMatMul(x, Wg); up = TiledMatMul(x, Wu)
TiledMatMul(Mul(Mul(gate, Sigmoid(gate)), up), Wd)  ->  corral.cpu::TiledFeedForward(x, [Wg; Wu], Wd)
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.lower.corral_cpu.matmul import MATMUL
from corral.graphs.lower.corral_cpu.stored import two_matrices
from corral.graphs.lower.onnxruntime.merge_matmul import merge_stored
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent, made_by
from corral.spec.cpu_ops import DOMAIN
from corral.spec.errors import InputError
from corral.spec.model_config import LayerConfig
from corral.spec.quant_scheme import scheme_named

FEED_FORWARD = "TiledFeedForward"


def fuse_feed_forward(work: ModelAndPlan) -> bool:
    """Fuse the feed-forward of every layer, but where a recipe's rule leaves a matrix in float or parts gate from up.

    Raises PatternAbsent where one was not found, and InputError where its halves were published in different ways.
    """
    expected = sum(is_fused(work, i, layer) for i, layer in enumerate(work.config.layers))
    fused = sum(_fuse(work, down) for down in work.nodes(MATMUL, DOMAIN))
    if fused != expected:
        raise PatternAbsent(f"fuse_feed_forward fused {fused} feed-forwards, expected {expected}")
    return bool(fused)


def is_fused(work: ModelAndPlan, number: int, layer: LayerConfig) -> bool:
    """Whether this layer's feed-forward, or its shared expert, is stored so that it can be."""
    name = f"layers.{number}.feed_forward{'.shared_expert' if layer.moe else ''}"
    gate, up, down = (work.recipe.of(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
    return gate == up and all(scheme_named(matrix.weights).is_quantized for matrix in (gate, down))


def _fuse(work: ModelAndPlan, down: ir.Node) -> bool:
    product = made_by(down.inputs[0], "Mul")
    silu = made_by(product.inputs[0], "Mul") if product else None
    up = made_by(product.inputs[1], MATMUL) if product else None
    gate = made_by(silu.inputs[0], MATMUL) if silu else None
    sigmoid = made_by(silu.inputs[1], "Sigmoid") if silu else None
    if not (product and silu and up and gate and sigmoid):
        return False
    if sigmoid.inputs[0] is not gate.outputs[0] or gate.inputs[0] is not up.inputs[0]:
        return False
    halves = [entry for node in (gate, up) if (entry := work.entry_of(node.inputs[1]))]
    if work.recipe.of(halves[0].weight) != work.recipe.of(halves[1].weight):
        return False
    if halves[0].steps != halves[1].steps:
        raise InputError(
            f"{halves[0].weight} and {halves[1].weight} are quantized in different ways; corral's CPU kernels take them "
            "as one matrix. Use --kernels stock."
        )
    x, down_weights = gate.inputs[0], down.inputs[1:]
    build = tape.Tape()
    bits = {"gate_up_bits": gate.attributes["bits"].as_int(), "down_bits": down.attributes["bits"].as_int()}
    weights = two_matrices(merge_stored(work, [gate, up]), down_weights)
    y = build.op(FEED_FORWARD, [x, *weights], bits, domain=DOMAIN)
    work.replace_node(down, build.nodes, [y])
    work.graph.remove([product, silu, sigmoid, gate, up], safe=True)
    return True
