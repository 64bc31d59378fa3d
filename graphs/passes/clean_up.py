"""Remove what other passes left: unused nodes, functions and initializers, identities, repeated expressions."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from corral.graphs.model_and_plan import ModelAndPlan


def clean_up(work: ModelAndPlan) -> bool:
    """Run onnx-ir's own passes, in an order that lets each see what the one before left."""
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    return passes(work.model).modified
