"""Mul(CastLike(RMSNormalization(x, ones), x), w) -> RMSNormalization(x, w).

The standard operator casts the normalized value back before it multiplies by the scale, which is Llama 4's own order, so
the two are equal in every type (ONNX RMSNormalization-23: Y = Normalized * Scale, Normalized of X's type).
"""

from __future__ import annotations

import onnx_ir as ir

from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent


def fuse_rms_norm_weight(work: ModelAndPlan) -> bool:
    """Fuse every weighted RMS norm. Raises PatternAbsent unless there are two a layer and a final one."""
    fused = 0
    for norm in work.nodes("RMSNormalization"):
        ones = norm.inputs[1]
        multiply = _only_user(norm.outputs[0])
        if multiply is not None and multiply.op_type == "CastLike":
            multiply = _only_user(multiply.outputs[0])
        if ones is None or multiply is None or multiply.op_type != "Mul":
            continue
        weight = next((value for value in multiply.inputs if work.entry_of(value)), None)
        producer = ones.producer()
        if weight is None or producer is None or producer.op_type != "ConstantOfShape":
            continue
        norm.replace_input_with(1, weight)
        multiply.outputs[0].replace_all_uses_with(norm.outputs[0])
        work.graph.remove(multiply, safe=True)
        fused += 1
    expected = 2 * work.config.num_layers + 1
    if fused != expected:
        raise PatternAbsent(f"fuse_rms_norm_weight fused {fused} norms, expected {expected}")
    return True


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None
