"""The whole lowering as one literal list, in phases. Read it aloud: that is what corral does to a graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from corral.graphs.lower.corral_cpu import attention as corral_attention
from corral.graphs.lower.corral_cpu import experts as corral_experts
from corral.graphs.lower.corral_cpu import matmul as corral_matmul
from corral.graphs.lower.corral_cpu.add_norm import lower_add_norm
from corral.graphs.lower.corral_cpu.feed_forward import fuse_feed_forward
from corral.graphs.lower.corral_cpu.shared_expert import join_shared_expert
from corral.graphs.lower.onnxruntime.attention import lower_attention
from corral.graphs.lower.onnxruntime.matmul import lower_matmul
from corral.graphs.lower.onnxruntime.merge_matmul import merge_matmul
from corral.graphs.lower.onnxruntime.moe import lower_moe
from corral.graphs.lower.precision import lower_precision
from corral.graphs.lower.tensorrt import attention as tensorrt_attention
from corral.graphs.lower.tensorrt import moe as tensorrt_moe
from corral.graphs.lower.tensorrt.capacity import fix_capacity
from corral.graphs.lower.tensorrt.fp8 import lower_fp8_matmul
from corral.graphs.lower.tensorrt.join_matmul import join_matmul
from corral.graphs.lower.tensorrt.plugin_moe import lower_plugin_moe
from corral.graphs.model_and_plan import ModelAndPlan, Pass
from corral.graphs.passes.clean_up import clean_up
from corral.graphs.passes.fold_weight_transposes import fold_weight_transposes
from corral.graphs.passes.fuse_rms_norm_weight import fuse_rms_norm_weight
from corral.graphs.passes.gather_logit_rows import gather_logit_rows
from corral.graphs.passes.name_nodes import name_nodes
from corral.graphs.quantize.quantize import quantize_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """Passes that belong together; a pass of phase "lower" is run for its lowering only."""

    name: str
    passes: tuple[Pass, ...]


SIMPLIFY = Phase("simplify", (clean_up, fold_weight_transposes, fuse_rms_norm_weight, gather_logit_rows, clean_up))
QUANTIZE = Phase("quantize", (quantize_weights,))
TENSORRT = Phase(
    "lower",
    (
        fix_capacity,
        tensorrt_attention.lower_attention,
        tensorrt_moe.lower_moe,
        join_matmul,
        lower_fp8_matmul,
        clean_up,
        lower_precision,
        lower_plugin_moe,
        clean_up,
        name_nodes,
    ),
)
LOWER: dict[str, Phase] = {
    "portable": Phase(
        "lower", (clean_up, name_nodes)
    ),  # the fallback bodies and DequantizeLinear are standard ONNX already
    "cpu": Phase("lower", (lower_attention, lower_moe, lower_matmul, merge_matmul, clean_up, name_nodes)),
    "cpu-corral": Phase(
        "lower",
        (
            corral_experts.lower_experts,
            corral_matmul.lower_matmul,
            fuse_feed_forward,
            join_shared_expert,
            merge_matmul,
            corral_attention.lower_attention,
            lower_add_norm,
            clean_up,
            name_nodes,
        ),
    ),
    "cuda": Phase(
        "lower",
        (
            lower_attention,
            lower_moe,
            lower_matmul,
            merge_matmul,
            clean_up,
            lower_precision,
            clean_up,
            name_nodes,
        ),
    ),
    "tensorrt-rtx": TENSORRT,
    "tensorrt": TENSORRT,
}


def phases(lowering: str) -> tuple[Phase, ...]:
    """All phases for a recipe's `lowering`, in order."""
    return (SIMPLIFY, QUANTIZE, LOWER[lowering])


def run_phase(phase: Phase, work: ModelAndPlan) -> bool:
    """Run a phase's passes; returns whether any changed the graph. An error names the pass and those before it."""
    changed = False
    for i, run in enumerate(phase.passes):
        try:
            did = run(work)
        except AssertionError as error:
            before = ", ".join(p.__name__ for p in phase.passes[:i]) or "none"
            error.add_note(f"in pass {run.__name__} of phase {phase.name} (passes before it: {before})")
            raise
        log.info("%s: %s %s", phase.name, run.__name__, "changed the graph" if did else "changed nothing")
        changed |= did
    return changed
