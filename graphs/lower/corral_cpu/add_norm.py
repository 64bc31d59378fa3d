"""RMSNormalization(x, weight) -> corral.cpu::AddRmsNorm(x, weight), and with the sum before it:

    sum = Add(residual, x); y = RMSNormalization(sum, weight)  ->  y, sum = AddRmsNorm(x, weight, residual)

A sum that passes from one stage to the next stays an Add: its norm is the next stage's.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.graphs.lower.corral_cpu.stored import import_kernels
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent, made_by
from corral.graphs.split_stages import stage_ranges
from corral.spec.cpu_ops import DOMAIN

ADD_NORM = "AddRmsNorm"


def lower_add_norm(work: ModelAndPlan) -> bool:
    """Lower every weighted norm. Raises PatternAbsent unless there are two a layer and a final one."""
    import_kernels(work)
    norms = [node for node in work.nodes("RMSNormalization") if work.entry_of(node.inputs[1])]
    expected = 2 * work.config.num_layers + 1
    if len(norms) != expected:
        raise PatternAbsent(f"lower_add_norm found {len(norms)} norms, expected {expected}")
    after_border = {f"layers.{first}.input_layernorm" for first, _ in stage_ranges(work)[1:]}
    for norm in norms:
        add = made_by(norm.inputs[0], "Add")
        if add is not None and norm.metadata_props[SCOPE] not in after_border:
            _lower_both(work, add, norm)
        else:
            build = tape.Tape()
            y = build.op(ADD_NORM, list(norm.inputs), _epsilon(norm), domain=DOMAIN)
            work.replace_node(norm, build.nodes, [y])
    return True


def _lower_both(work: ModelAndPlan, add: ir.Node, norm: ir.Node) -> None:
    """One node in the place of the sum, whose name says so: it belongs to the layer, not to the norm."""
    residual, x = add.inputs
    build = tape.Tape()
    y, total = build.op_multi_out(ADD_NORM, [x, norm.inputs[1], residual], _epsilon(norm), domain=DOMAIN, num_outputs=2)
    norm.outputs[0].replace_all_uses_with(y)
    work.graph.remove(norm, safe=True)
    work.replace_node(add, build.nodes, [total])


def _epsilon(norm: ir.Node) -> dict[str, float]:
    return {"epsilon": norm.attributes["epsilon"].as_float()}
