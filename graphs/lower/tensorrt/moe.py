"""corral::MoE -> blocks of rows that each belong to one expert, multiplied by that expert's matrices: no data-dependent shape.

    visits      top-k of the router logits: V = T * k pairs of token and expert
    one-hot -> cumulative sum        a visit's place among its expert's visits
    places -> slots                  each expert has whole blocks of B rows: its visits, then rows of zeros
    ScatterND(zeros, slot, sigmoid(logit) * x)                     [NB * B, H]
    [NB, B, H] @ Gather(gate_up, expert of block)  -> SwiGLU ->  [NB, B, I] @ Gather(down, expert of block),
                                                                                       summed over tiles of I
    Gather(rows, slot)               back to the visits, and their sum over k

NB = min(V, E) + floor((V - min(V, E)) / B) blocks always suffice: the fullest case has min(V, E) visited experts, and each
further B visits fill at most one block more. B = V / E, at least 1 and at most `MAX_BLOCK`: a decode step multiplies
single rows by the chosen experts' matrices alone, and a prefill reads an expert's matrices about twice, whatever the
routing, for at most twice the rows. Exact, with every size known from the number of tokens, which is what TensorRT asks
for: it has neither NonZero on all devices, nor a loop over experts that leaves quantized weights packed.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from corral.exporter.capture import SCOPE
from corral.exporter.ops.custom_op import DOMAIN
from corral.exporter.ops.moe import NAME
from corral.graphs.lower.tensorrt.expert_tiles import Tile, cut_experts
from corral.graphs.lower.tensorrt.fp8 import fp8_product
from corral.graphs.lower.tensorrt.plugin_moe import plugins_cover
from corral.graphs.model_and_plan import ModelAndPlan, PatternAbsent
from corral.graphs.quantize.float_weight import find_float
from corral.spec.expert_tiles import MAX_BLOCK

LAYER = re.compile(r"layers\.\d+")
LOWEST = np.finfo(np.float32).min


def lower_moe(work: ModelAndPlan) -> bool:
    """Lower every MoE layer that plugins do not cover. Raises PatternAbsent unless there is one node per MoE layer."""
    nodes = list(work.nodes(NAME, DOMAIN))
    expected = sum(layer.moe for layer in work.config.layers)
    if len(nodes) != expected:
        raise PatternAbsent(f"lower_moe found {len(nodes)} corral::MoE, expected {expected}")
    left = [node for node in nodes if not plugins_cover(work, node)]
    for node in left:
        build = tape.Tape()
        blocks = _Blocks(build, work)
        y = blocks.routed(node)
        work.replace_node(node, build.nodes, [y])
        for total in blocks.totals:  # as residual sums, in float32
            total.metadata_props[SCOPE] = LAYER.findall(total.metadata_props[SCOPE])[0]
    return bool(left)


class _Blocks:
    """One layer being lowered. Letters: T tokens, k experts a token, V = T * k visits, NB blocks of B rows."""

    def __init__(self, build: tape.Tape, work: ModelAndPlan) -> None:
        self.build, self.op, self.work = build, build.op, work
        self.multi = build.op_multi_out
        self.experts, self.hidden = work.config.num_local_experts, work.config.hidden_size
        self.k = work.config.num_experts_per_tok
        self.totals: list[ir.Node] = []  # what sums tiles

    def routed(self, node: ir.Node) -> ir.Value:
        x, logits = node.inputs[:2]
        assert x is not None
        tiles = cut_experts(self.work, node)
        top, chosen = self.multi("TopK", [logits, self.ints(self.k)], {"axis": -1}, num_outputs=2)
        gate_V1, expert_V1 = self.rows(self.op("Sigmoid", [top]), 1), self.rows(chosen, 1)
        visits_VH = self.op("Mul", [self.repeated(self.rows(x, self.hidden)), gate_V1])

        count = self.op("Squeeze", [self.op("Shape", [expert_V1], {"start": 0, "end": 1})])
        block = self.block_size(count)
        slot_V, expert_NB = self.slots(expert_V1, count, block)
        blocks_NBBH = self.scattered(visits_VH, slot_V, expert_NB, block)
        answer = self.in_tiles(blocks_NBBH, tiles, expert_NB)
        answers_VH = self.op("Gather", [self.rows(answer, self.hidden), slot_V], {"axis": 0})
        return self.op("Reshape", [self.summed(answers_VH), self.op("Shape", [x])])

    def block_size(self, count: ir.Value) -> ir.Value:
        """B, of V."""
        even = self.op("Div", [count, self.scalar(self.experts)])
        return self.op("Min", [self.op("Max", [even, self.scalar(1)]), self.scalar(MAX_BLOCK)])

    def slots(self, expert_V1: ir.Value, count: ir.Value, block: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The row of each visit in [NB * B], and the expert of each block."""
        hot_VE = self.op("Cast", [self.op("Equal", [expert_V1, self.numbers()])], {"to": ir.DataType.INT32})
        block32 = self.op("Cast", [block], {"to": ir.DataType.INT32})
        rank_VE = self.op("Mul", [self.op("CumSum", [hot_VE, self.scalar(0)]), hot_VE])  # from 1, 0 for other experts
        visits_E = self.op("ReduceSum", [hot_VE, self.ints(0)], {"keepdims": 0})
        upper_E = self.op("Add", [visits_E, self.op("Sub", [block32, self.scalar32(1)])])
        blocks_E = self.op("Div", [upper_E, block32])
        end_E = self.op("CumSum", [blocks_E, self.scalar(0)])
        first_row_E = self.op("Mul", [self.op("Sub", [end_E, blocks_E]), block32])
        row_VE = self.op("Add", [rank_VE, self.op("Mul", [hot_VE, first_row_E])])
        row_V = self.op("ReduceSum", [row_VE, self.ints(1)], {"keepdims": 0})
        slot_V = self.op("Cast", [self.op("Sub", [row_V, self.scalar32(1)])], {"to": ir.DataType.INT64})

        visited = self.op("Min", [count, self.scalar(self.experts)])
        more = self.op("Div", [self.op("Sub", [count, visited]), block])
        # Always the smallest of the three; the others bound it for a builder that only knows the range of V.
        full = self.op("Add", [self.op("Div", [count, self.scalar(MAX_BLOCK)]), self.scalar(2 * self.experts)])
        blocks = self.op("Min", [self.op("Min", [self.op("Add", [visited, more]), count]), full])
        number_NB = self.op("Range", [self.scalar(0), blocks, self.scalar(1)])
        number_NB1 = self.op("Cast", [self.op("Unsqueeze", [number_NB, self.ints(1)])], {"to": ir.DataType.INT32})
        passed = self.op("Cast", [self.op("LessOrEqual", [end_E, number_NB1])], {"to": ir.DataType.INT32})
        expert_NB = self.op("ReduceSum", [passed, self.ints(1)], {"keepdims": 0})
        # Blocks that nothing needs come after the last expert: they hold zeros, and any expert will do.
        return slot_V, self.op("Min", [expert_NB, self.scalar32(self.experts - 1)])

    def scattered(self, visits_VH: ir.Value, slot_V: ir.Value, expert_NB: ir.Value, block: ir.Value) -> ir.Value:
        """[NB, B, H]: each visit at its slot, zeros elsewhere."""
        blocks = self.op("Shape", [expert_NB])
        one_block = self.op("Unsqueeze", [block, self.ints(0)])
        rows = self.op("Mul", [blocks, one_block])
        flat = self.op("Concat", [rows, self.ints(self.hidden)], {"axis": 0})
        zeros = self.op("Expand", [self.work.constant(ir.tensor(np.float32(0), name="zero_float")), flat])
        index_V1 = self.op("Unsqueeze", [slot_V, self.ints(1)])
        filled = self.op("ScatterND", [zeros, index_V1, visits_VH])
        return self.op("Reshape", [filled, self.op("Concat", [blocks, one_block, self.ints(self.hidden)], {"axis": 0})])

    def in_tiles(self, x: ir.Value, tiles: list[Tile], expert_NB: ir.Value) -> ir.Value:
        """The sum of all tiles' answers, each begun when those before are done."""
        gate_up, down = tiles[0]
        total = self.swiglu(x, gate_up, down, expert_NB)
        for gate_up, down in tiles[1:]:
            answer = self.swiglu(x, gate_up, down, self.after(total, expert_NB))
            total = self.total("Add", total, answer)
        return total

    def after(self, total: ir.Value, expert_NB: ir.Value) -> ir.Value:
        """`expert_NB` that is only known after `total`.

        Otherwise one kernel gathers all tiles of a layer at once, and nothing is gained. Another expert is taken only
        where every sum is minus infinity, and there no expert is right.
        """
        axes, lowest = self.ints(0, 1, 2), self.work.constant(ir.tensor(LOWEST, name="lowest_float"))
        highest = self.total("ReduceMax", total, axes, keepdims=0)
        lost = self.total("LessOrEqual", highest, lowest)
        other = self.op("Add", [expert_NB, self.op("Cast", [lost], {"to": ir.DataType.INT32})])
        return self.op("Min", [other, self.scalar32(self.experts - 1)])

    def total(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """An operator over sums of tiles."""
        value = self.op(operator, list(inputs), attributes)
        node = value.producer()
        assert node is not None
        self.totals.append(node)
        return value

    def swiglu(self, x: ir.Value, gate_up: ir.Value | None, down: ir.Value | None, expert_NB: ir.Value) -> ir.Value:
        """(silu(x @ gate) * (x @ up)) @ down, per block with its expert's matrices."""
        both = self.product(x, gate_up, expert_NB)
        gate, up = self.multi("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        silu = self.op("Mul", [gate, self.op("Sigmoid", [gate])])
        return self.product(self.op("Mul", [silu, up]), down, expert_NB)

    def product(self, x: ir.Value, weight: ir.Value | None, expert_NB: ir.Value) -> ir.Value:
        """x [NB, B, K] @ weight [E, K, N] of each block's expert -> [NB, B, N]."""
        fp8 = find_float(self.work, weight)
        if fp8 is None or not fp8.rounds_inputs:
            return self.op("MatMul", [x, self.op("Gather", [weight, expert_NB], {"axis": 0})])
        codes, gain = (self.op("Gather", [part, expert_NB], {"axis": 0}) for part in (fp8.dequantized, fp8.gain))
        gathered = dataclasses.replace(fp8, dequantized=codes, gain=gain)
        return fp8_product(self.build, self.work, x, gathered, axes=(0, 2, 1))

    def repeated(self, x_TH: ir.Value) -> ir.Value:
        """Each token once per visit: [T, H] -> [V, H]."""
        if self.k == 1:
            return x_TH
        wide = self.op("Expand", [self.op("Unsqueeze", [x_TH, self.ints(1)]), self.ints(1, self.k, 1)])
        return self.rows(wide, self.hidden)

    def summed(self, answers_VH: ir.Value) -> ir.Value:
        """The sum of each token's visits: [V, H] -> [T, H]."""
        if self.k == 1:
            return answers_VH
        by_token = self.op("Reshape", [answers_VH, self.ints(-1, self.k, self.hidden)])
        return self.op("ReduceSum", [by_token, self.ints(1)], {"keepdims": 0})

    def rows(self, x: ir.Value | None, width: int) -> ir.Value:
        """[..., width] -> [n, width]."""
        return self.op("Reshape", [x, self.ints(-1, width)])

    def numbers(self) -> ir.Value:
        return self.work.constant(ir.tensor(np.arange(self.experts), name="expert_numbers"))

    def ints(self, *values: int) -> ir.Value:
        """A 1-D constant, int64."""
        return self.work.constant(ir.tensor(np.array(values), name="list_" + "_".join(map(str, values))))

    def scalar(self, value: int) -> ir.Value:
        """A scalar constant, int64."""
        return self.work.constant(ir.tensor(np.array(value), name=f"int64_{value}"))

    def scalar32(self, value: int) -> ir.Value:
        return self.work.constant(ir.tensor(np.array(value, np.int32), name=f"int32_{value}"))
