"""A quantized weight as lowerings find it in the graph: DequantizeLinear over two planned initializers."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from corral.graphs.model_and_plan import ModelAndPlan, made_by
from corral.spec.weight_plan import Entry


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one weight [..., inputs, outputs], scales [..., inputs / group_size, outputs], and zero points of the scales'
    shape where codes are asymmetric.
    """

    codes: Entry
    scales: Entry
    bits: int
    group_size: int
    dequantize: ir.Node
    zeros: Entry | None = None

    def store(self, work: ModelAndPlan, codes: Entry, scales: Entry, zeros: Entry | None) -> list[ir.Value]:
        """Replace the entries by another layout of theirs, in plan and graph; the DequantizeLinear is left unused."""
        for i in range(len(self.dequantize.inputs)):
            self.dequantize.replace_input_with(i, None)
        stored = ((self.codes, codes), (self.scales, scales), (self.zeros, zeros))
        return [work.replace_weight(old, new)[0] for old, new in stored if old is not None and new is not None]


def find_quantized(work: ModelAndPlan, value: ir.Value | None) -> QuantizedWeight | None:
    """The quantized weight behind a value, or None where it is not one."""
    node = made_by(value, "DequantizeLinear")
    if node is None:
        return None
    codes, scales = work.entry_of(node.inputs[0]), work.entry_of(node.inputs[1])
    if codes is None or scales is None:
        return None
    quantizer = dict(next(step for step in codes.steps if step.output).args)
    zeros = work.entry_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return QuantizedWeight(codes, scales, int(quantizer["bits"]), int(quantizer["group_size"]), node, zeros)
