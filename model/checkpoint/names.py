"""Our parameter names and shapes, and what the published checkpoint forms call them.

Our names are those of `model/text.py`. A form is a prefix for everything but the head, and the head's full name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from corral.spec.model_config import LayerConfig, ModelConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class NameForm:
    """One spelling of a checkpoint's tensor names."""

    description: str
    prefix: str
    head: str

    def source(self, name: str) -> str:
        """What this form calls our parameter `name`."""
        return self.head if name == HEAD else self.prefix + name


FORMS = (
    NameForm(description="llama4_text", prefix="model.", head="lm_head.weight"),
    NameForm(description="llama4", prefix="language_model.model.", head="language_model.lm_head.weight"),
    # How transformers 5 nests other multimodal models; its Llama 4 may follow.
    NameForm(description="llama4, head outside", prefix="model.language_model.", head="lm_head.weight"),
)

# Start of a tensor's name -> why it is not read. Anything else that is not a parameter of the decoder is an error.
DROPPED_PREFIXES = {
    "vision_model.": "image encoder",
    "multi_modal_projector.": "image encoder",
    "model.vision_model.": "image encoder",
    "model.multi_modal_projector.": "image encoder",
    # In Meta's own files.
    "vision_embeddings.": "image encoder",
    "vision_projection.": "image encoder",
}
# End of a tensor's name -> why it is not read: what belongs to quantized activations or a quantized KV cache, not to weights.
DROPPED_SUFFIXES = {
    ".input_scale": "activation scale",
    ".input_zero_point": "activation zero point",
    ".output_scale": "activation scale",
    ".output_zero_point": "activation zero point",
    ".q_scale": "activation scale",
    ".k_scale": "KV cache scale",
    ".v_scale": "KV cache scale",
}


def detect_form(names: Collection[str], config: ModelConfig) -> NameForm:
    """The form under which the most parameters are found; the first where none is."""
    known, ours = set(names), expected_parameters(config)
    return max(FORMS, key=lambda form: sum(form.source(name) in known for name in ours))


def is_dropped(name: str) -> bool:
    """Whether a tensor is deliberately not read."""
    return name.startswith(tuple(DROPPED_PREFIXES)) or name.endswith(tuple(DROPPED_SUFFIXES))


def expected_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `Llama4Text(config)`, in its order. Tied embeddings have no `lm_head`."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i, layer in enumerate(config.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_parameters(config, layer).items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _layer_parameters(config: ModelConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    hidden, experts, width = config.hidden_size, config.num_local_experts, config.intermediate_size
    attention = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (config.query_size, hidden),
        "self_attn.k_proj.weight": (config.kv_size, hidden),
        "self_attn.v_proj.weight": (config.kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, config.query_size),
        "post_attention_layernorm.weight": (hidden,),
    }
    if not layer.moe:
        return attention | _mlp_parameters("feed_forward", hidden, config.intermediate_size_mlp)
    return (
        attention
        | {
            "feed_forward.router.weight": (experts, hidden),
            "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * width),
            "feed_forward.experts.down_proj": (experts, width, hidden),
        }
        | _mlp_parameters("feed_forward.shared_expert", hidden, width)
    )


def _mlp_parameters(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (width, hidden),
        f"{name}.up_proj.weight": (width, hidden),
        f"{name}.down_proj.weight": (hidden, width),
    }
