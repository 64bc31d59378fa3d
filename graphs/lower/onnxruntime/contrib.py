"""ONNX Runtime's own operator domain, and what all its quantized operators share."""

from __future__ import annotations

from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec.target import target_named

CONTRIB = "com.microsoft"
# On the CPU: activations in int8. The default computes in float32 at a fraction of the speed. CUDA's have 16 bits.
ACCURACY_LEVEL = {"cpu": 4, "cuda": 0}


def accuracy_level(work: ModelAndPlan) -> int:
    """That attribute of a quantized operator, for where the recipe's target runs it."""
    return ACCURACY_LEVEL[target_named(work.recipe.target).provider]


def import_contrib(work: ModelAndPlan) -> None:
    """Declare the domain in the graph's opset imports."""
    work.model.opset_imports[CONTRIB] = 1
