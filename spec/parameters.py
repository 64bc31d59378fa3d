"""How many parameters a decoder has, by kind of weight: all of them, and those that one token uses."""

from __future__ import annotations

from collections import Counter

from corral.spec.model_config import LayerConfig, ModelConfig


def layer_parameters(config: ModelConfig, layer: LayerConfig) -> Counter[str]:
    """Kind of weight (as in the coverage table) -> parameters of one layer."""
    hidden, width = config.hidden_size, config.intermediate_size
    counts = Counter(
        {"attention": 2 * hidden * (config.query_size + config.kv_size), "norm": 2 * hidden}
    )  # q and o, k and v
    if not layer.moe:
        return counts + Counter({"dense": 3 * hidden * config.intermediate_size_mlp})
    experts = config.num_local_experts
    return counts + Counter(
        {"experts": 3 * hidden * width * experts, "shared expert": 3 * hidden * width, "router": hidden * experts}
    )


def parameters(config: ModelConfig) -> Counter[str]:
    """Kind of weight -> parameters of the whole decoder. A tied head is stored once and counted once."""
    table = config.vocab_size * config.hidden_size
    counts = Counter({"embedding": table, "norm": config.hidden_size})
    if not config.tie_word_embeddings:
        counts["head"] = table
    for layer in config.layers:
        counts += layer_parameters(config, layer)
    return counts


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses, counted as the makers do: the whole embedding, and the chosen experts only."""
    counts = parameters(config)
    unused = counts["experts"] * (config.num_local_experts - config.num_experts_per_tok)
    return counts.total() - (unused // config.num_local_experts if config.num_local_experts else 0)
