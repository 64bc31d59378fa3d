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


def gather_logit_rows(work: ModelAndPlan) -> bool:
    """Rewrite the one gather. Raises PatternAbsent where it is not there."""
    nodes = list(work.nodes("GatherElements"))
    if len(nodes) != 1:
        raise PatternAbsent(f"gather_logit_rows found {len(nodes)} GatherElements, expected 1")
    rows = next(value for value in work.graph.inputs if value.name == graph_io.LOGIT_ROWS)
    build = tape.Tape()
    last = work.constant(ir.tensor(np.array([-1]), name="last_axis"))
    chosen = build.op("GatherND", [nodes[0].inputs[0], build.op("Unsqueeze", [rows, last])], {"batch_dims": 1})
    work.replace_node(nodes[0], build.nodes, [chosen])
    return True
