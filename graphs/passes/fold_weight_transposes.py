"""MatMul(x, Transpose(W)) -> MatMul(x, W'): the plan stores the weight transposed, [inputs, outputs]."""

from __future__ import annotations

import dataclasses

from corral.exporter.planned_tensor import replace_initializer
from corral.graphs.model_and_plan import ModelAndPlan
from corral.spec.weight_plan import step


def fold_weight_transposes(work: ModelAndPlan) -> bool:
    """Fold each transposition of a planned matrix into its storage layout, where all its uses transpose it."""
    changed = False
    for node in work.nodes("Transpose"):
        weight = node.inputs[0]
        entry = work.entry_of(weight)
        if weight is None or entry is None or len(entry.shape) != 2 or entry.steps[-1].name != "rows":
            continue
        transposes = [use.node for use in weight.uses()]
        if any(user.op_type != "Transpose" for user in transposes):
            continue
        transposed = dataclasses.replace(
            entry.with_layout(step("columns", dtype=entry.dtype)), shape=entry.shape[::-1], cut="columns"
        )
        new = replace_initializer(work.graph, weight, transposed)
        work.plan.replace(entry.name, transposed)
        for user in transposes:
            user.outputs[0].replace_all_uses_with(new)
            work.graph.remove(user, safe=True)
        changed = True
    return changed
