"""ONNX Runtime's own operator domain, and what all its quantized operators share."""

from __future__ import annotations

from corral.graphs.model_and_plan import ModelAndPlan

CONTRIB = "com.microsoft"
INT8_DOT_PRODUCTS = 4  # accuracy_level; the default computes in float32 at a fraction of the speed


def import_contrib(work: ModelAndPlan) -> None:
    """Declare the domain in the graph's opset imports."""
    work.model.opset_imports[CONTRIB] = 1
