"""GatherElements(x, Expand(logit_rows)) -> GatherND(x, logit_rows, batch_dims=1).

The exporter's form spreads each row number over the hidden size, and the sizes it needs for that are computed on the
host: in the middle of a step TensorRT would wait for them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.spec import graph_io

GATHERS = 2  # in the last layer: what is attended to, and the residual stream


def gather_logit_rows(work: ModelAndPlan) -> bool:
    """Rewrite the gathers of the rows that logits are computed of. Raises PatternAbsent unless both are there."""
    nodes = list(work.nodes("GatherElements"))
    if len(nodes) != GATHERS:
        raise PatternAbsent(f"gather_logit_rows found {len(nodes)} GatherElements, expected {GATHERS}")
    rows = next(value for value in work.graph.inputs if value.name == graph_io.LOGIT_ROWS)
    last = work.constant(ir.tensor(np.array([-1]), name="last_axis"))
    for node in nodes:
        build = tape.Tape()
        chosen = build.op("GatherND", [node.inputs[0], build.op("Unsqueeze", [rows, last])], {"batch_dims": 1})
        work.replace_node(node, build.nodes, [chosen])
    return True
