"""A checkpoint -> its graph and its weight plan: the first stage of every compile."""

from __future__ import annotations

import onnx_ir as ir

from corral.exporter.bind_weights import bind_weights
from corral.exporter.capture import capture
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.weight_plan import WeightPlan

Exported = tuple[ir.Model, WeightPlan]


def export(checkpoint: Checkpoint) -> Exported:
    """Capture the decoder that `checkpoint` describes and plan its weights. Reads headers only, no weight."""
    model = capture(checkpoint.config)
    return model, bind_weights(model, checkpoint)
