"""What Meta's `consolidated.*.pth` call our parameters, and how tensor parallelism has cut them.

Sources: [M] https://github.com/meta-llama/llama-models: the load hooks in models/llama4/model.py, moe.py and ffn.py,
and `reshard_mp` in models/checkpoint.py; [H] transformers' convert_llama4_weights_to_hf.py; [T] torchtitan's
experiments/llama4/scripts/convert_meta_to_dcp_with_gpus.py. The three agree on every row.

Letters in Meta's names: D our H (hidden), F our I (width of an expert), E or e experts. Shard r of R holds:

- fused projections whole for its part of the heads or of the width: [q_r; k_r; v_r], [w1_r; w3_r] ([M] Attention and
  FeedForward.load_hook);
- each expert's columns (in, swiglu) or rows (out) r*F/R to (r+1)*F/R, experts stacked in the first dimension
  ([M] Experts.load_hook: `.view(e, D, -1)`, `.view(e, -1, D)`);
- norms and router as they are, the router [D, E] ([M] MoE: `x @ router_DE`).

Queries and keys need no permutation: Meta's rotation and ours both take interleaved pairs ([M] apply_rotary_emb; in [H]
`permute_for_rope` is commented out).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from corral.model.checkpoint.torch_file import StoredTensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a stored tensor holds values of ours. Shapes and dimensions are those of our parameter."""

    holds: tuple[str, ...]  # our parameters, one after the other in the stored rows
    joined: int | None  # along which the shards follow one another; None: each shard has all of it
    experts: bool = False  # stored [E * rows, columns], ours [E, rows, columns]
    transposed: bool = False
    half: int | None = None  # only the first or second half of our last dimension

    def part(self, whole: tuple[int, ...], shards: int) -> tuple[int, ...]:
        """Shape of what one of `shards` holds of a parameter of shape `whole`."""
        part = list(whole)
        if self.half is not None:
            part[-1] //= 2
        if self.joined is not None:
            part[self.joined] //= shards
        return tuple(part)

    def origin(self, whole: tuple[int, ...], rank: int, shards: int) -> tuple[int, ...]:
        """Where in the parameter that begins."""
        part = self.part(whole, shards)
        origin = [0] * len(whole)
        if self.half:
            origin[-1] = whole[-1] // 2
        if self.joined is not None:
            origin[self.joined] += rank * part[self.joined]
        return tuple(origin)

    def stored_shape(self, wholes: Sequence[tuple[int, ...]], shards: int) -> tuple[int, ...]:
        """Shape of the stored tensor that holds parameters of these shapes."""
        each = [self._stored(self.part(whole, shards)) for whole in wholes]
        return (sum(shape[0] for shape in each), *each[0][1:])

    def split(self, stored: StoredTensor, wholes: Sequence[tuple[int, ...]], shards: int) -> Iterator[StoredTensor]:
        """The part of each parameter in a tensor of `stored_shape`, turned as the parameter is."""
        start = 0
        for whole in wholes:
            part = self.part(whole, shards)
            rows = stored.rows(start, start := start + self._stored(part)[0])
            yield rows.unflatten(part[0]) if self.experts else rows.transpose() if self.transposed else rows

    def _stored(self, part: tuple[int, ...]) -> tuple[int, ...]:
        if self.experts:
            return (part[0] * part[1], part[2])
        return part[::-1] if self.transposed else part


def _layout(*holds: str, joined: int | None, **more: bool | int) -> Layout:
    return Layout(holds=holds, joined=joined, **more)  # type: ignore[arg-type]


GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
# Name within a layer -> layout. Where two rows hold the same parameter, files have one or the other.
LAYER_LAYOUTS = {
    "attention.wqkv.layer_norm_weight": _layout("input_layernorm.weight", joined=None),
    "attention_norm.weight": _layout("input_layernorm.weight", joined=None),
    "attention.wqkv.weight": _layout(
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", joined=0
    ),
    "attention.wq.weight": _layout("self_attn.q_proj.weight", joined=0),
    "attention.wk.weight": _layout("self_attn.k_proj.weight", joined=0),
    "attention.wv.weight": _layout("self_attn.v_proj.weight", joined=0),
    "attention.wo.weight": _layout("self_attn.o_proj.weight", joined=1),
    # The second norm: of a mixture of experts, of a dense layer, and as the module itself is called.
    "feed_forward.norm.weight": _layout("post_attention_layernorm.weight", joined=None),
    "feed_forward.mlp.layer_norm_weight": _layout("post_attention_layernorm.weight", joined=None),
    "ffn_norm.weight": _layout("post_attention_layernorm.weight", joined=None),
    "feed_forward.mlp.fc1_weight": _layout("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight", joined=0),
    "feed_forward.mlp.fc2_weight": _layout("feed_forward.down_proj.weight", joined=1),
    "feed_forward.w1.weight": _layout("feed_forward.gate_proj.weight", joined=0),
    "feed_forward.w3.weight": _layout("feed_forward.up_proj.weight", joined=0),
    "feed_forward.w2.weight": _layout("feed_forward.down_proj.weight", joined=1),
    "feed_forward.router_DE": _layout("feed_forward.router.weight", joined=None, transposed=True),
    "feed_forward.w_in_shared_FD.weight": _layout("feed_forward.shared_expert.gate_proj.weight", joined=0),
    "feed_forward.w_swiglu_FD.weight": _layout("feed_forward.shared_expert.up_proj.weight", joined=0),
    "feed_forward.w_out_shared_DF.weight": _layout("feed_forward.shared_expert.down_proj.weight", joined=1),
    "feed_forward.experts.moe_w_in_eD_F": _layout(GATE_UP, joined=2, experts=True, half=0),
    "feed_forward.experts.moe_w_swiglu_eD_F": _layout(GATE_UP, joined=2, experts=True, half=1),
    "feed_forward.experts.moe_w_out_eF_D": _layout(DOWN, joined=1, experts=True),
}
TOP_LAYOUTS = {
    "tok_embeddings.weight": _layout("embed_tokens.weight", joined=0),
    "norm.weight": _layout("norm.weight", joined=None),
    "output.weight": _layout("lm_head.weight", joined=0),
}
# Never read: rotation is computed from the config, and the rest is state of training. ([M] load hooks; [H] `None`)
IGNORED = re.compile(
    r"rope\.freqs|freqs?_cis|.*\._extra_state"
    r"|layers\.\d+\.feed_forward\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)
LAYER = re.compile(r"(?P<prefix>layers\.\d{1,5}\.)(?P<name>.+)")


def layout_of(stored: str) -> tuple[tuple[str, ...], Layout] | None:
    """Our parameters in a stored tensor, and how they lie there; None for a name that is not known."""
    match = LAYER.fullmatch(stored)
    prefix, name = (match["prefix"], match["name"]) if match else ("", stored)
    layout = (LAYER_LAYOUTS if match else TOP_LAYOUTS).get(name)
    return None if layout is None else (tuple(prefix + held for held in layout.holds), layout)
