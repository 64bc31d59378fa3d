"""`corral::MoE`: the routed half of Llama 4's mixture of experts.

    y = MoE(x, router_logits, gate_up, down)

| name          | type | shape      | meaning                                                       |
| ------------- | ---- | ---------- | ------------------------------------------------------------- |
| x             | T    | [..., H]   | tokens                                                        |
| router_logits | T    | [..., E]   |                                                               |
| gate_up       | T    | [E, H, 2I] | the experts' gate half, then their up half                    |
| down          | T    | [E, I, H]  |                                                               |
| y             | T    | [..., H]   | sum over the token's top-k experts e of expert_e(sigmoid(logit_e) * x) |

Attribute: `k`. Expert: SwiGLU, (silu(h @ gate) * (h @ up)) @ down.

The fallback body visits only experts that some token chose, one after the other, and computes only their tokens: neither
all experts for all tokens, nor a copy of an expert's weights per token.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn

from corral.exporter.ops.custom_op import DOMAIN, VERSION, CustomOp, parse_body
from corral.model.text import Experts
from corral.spec.model_config import ModelConfig

NAME = "MoE"


class MoENode(nn.Module):
    """Stands in for the model's `Experts` while capturing: same parameters, same call, one node."""

    def __init__(self, leaf: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = leaf.gate_up_proj, leaf.down_proj
        self.num_experts_per_tok = leaf.num_experts_per_tok

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            [x, router_logits, self.gate_up_proj, self.down_proj],
            attrs={"k": self.num_experts_per_tok},
            dtype=x.dtype,
            shape=x.shape,
            version=VERSION,
        )


def bodies(config: ModelConfig) -> list[ir.Function]:
    """The fallback body, in standard operators; none where the model has no MoE layer."""
    if not any(layer.moe for layer in config.layers):
        return []
    body = f"""
    x_shape = Shape (x)
    x_rows = Constant <value_ints = [-1, {config.hidden_size}]> ()
    x_TH = Reshape (x, x_rows)
    logit_rows = Constant <value_ints = [-1, {config.num_local_experts}]> ()
    logits_TE = Reshape (router_logits, logit_rows)
    k = Constant <value_ints = [{config.num_experts_per_tok}]> ()
    logits, chosen = TopK <axis = -1> (logits_TE, k)
    gate = Sigmoid (logits)
    visited = Unique (chosen)
    num_visited = Size (visited)
    sum_shape = Shape (x_TH)
    nothing = ConstantOfShape (sum_shape)
    start = CastLike (nothing, x)
    keep_going = Constant <value = bool {{1}}> ()
    y_TH = Loop (num_visited, keep_going, start) <body = visit_expert
        (int64 turn, bool go, float[t, h] sum_before) => (bool go_on, float[t, h] sum_after) {{
            go_on = Identity (go)
            expert = Gather <axis = 0> (visited, turn)
            mine = Equal (chosen, expert)
            visits_2n = NonZero (mine)
            visits = Transpose <perm = [1, 0]> (visits_2n)
            from_0 = Constant <value_ints = [0]> ()
            to_1 = Constant <value_ints = [1]> ()
            axis_1 = Constant <value_ints = [1]> ()
            token = Slice (visits, from_0, to_1, axis_1)
            x_mine = GatherND (x_TH, token)
            gate_1d = GatherND (gate, visits)
            gate_mine = Unsqueeze (gate_1d, axis_1)
            routed = Mul (x_mine, gate_mine)
            w_gate_up = Gather <axis = 0> (gate_up, expert)
            w_down = Gather <axis = 0> (down, expert)
            hidden = MatMul (routed, w_gate_up)
            hidden_gate, hidden_up = Split <axis = -1, num_outputs = 2> (hidden)
            sigmoid = Sigmoid (hidden_gate)
            silu = Mul (hidden_gate, sigmoid)
            activated = Mul (silu, hidden_up)
            answer = MatMul (activated, w_down)
            sum_after = ScatterND <reduction = "add"> (sum_before, token, answer)
        }}>
    y = Reshape (y_TH, x_shape)
    """
    return [parse_body(NAME, "<k>(x, router_logits, gate_up, down) => (y)", body)]


OP = CustomOp(leaf=Experts, node=MoENode, bodies=bodies)
