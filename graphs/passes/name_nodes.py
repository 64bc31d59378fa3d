"""Name every node after the module it came from, and every value after its node: the same graph, the same names.

layers.3.self_attn.q_proj.MatMulNBits      its output: layers.3.self_attn.q_proj.MatMulNBits:0
"""

from __future__ import annotations

from collections import Counter

from corral.exporter.capture import SCOPE
from corral.graphs.model_and_plan import ModelAndPlan


def name_nodes(work: ModelAndPlan) -> bool:
    """Give nodes and inner values names that do not depend on how the graph was made. Runs last."""
    seen: Counter[str] = Counter()
    for node in work.graph:
        scope = node.metadata_props.pop(SCOPE, "")
        name = f"{scope}.{node.op_type}" if scope else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{i}"
    return True
