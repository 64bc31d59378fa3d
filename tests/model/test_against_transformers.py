"""The reference model equals Hugging Face's Llama 4, in every form and on both sides of a chunk boundary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from corral.spec.model_config import parse_config

CHUNK = 16
TOLERANCE = 1e-5  # of the largest logit; both sides compute in float32


@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2", "tied"])
def test_logits_equal_transformers(
    form: str, tiny_checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    theirs = Llama4ForCausalLM.from_pretrained(tiny_checkpoint(form), dtype=torch.float32, attn_implementation="eager")
    theirs.eval()
    generator = torch.Generator().manual_seed(1)
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
        tokens = torch.randint(0, 320, (2, length), generator=generator)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
        got = reference(form).logits(tokens)
        assert expected.std() > 0.3, "logits must be far enough apart for the comparison to mean something"
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max(), f"{form}, {length} tokens"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        # Scout, as published, and Llama 3.1's, which has an interpolation band.
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
         "high_freq_factor": 1.0, "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ],
    ids=["plain", "scout", "band"],
)  # fmt: skip
def test_frequencies_equal_transformers_to_the_last_bit(rope: dict[str, Any]) -> None:
    """An angle is frequency times position: one bit of difference would be 0.01 radians at position 100,000."""
    config = Llama4TextConfig(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128, rope_parameters=rope
    )
    ours = torch.tensor(parse_config(config.to_dict()).inverse_frequencies(), dtype=torch.float32)
    assert torch.equal(ours, Llama4TextRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize("form", ["scout", "maverick", "topk2"])
def test_tiny_checkpoints_route_to_many_experts(form: str, reference: Callable[[str], Any]) -> None:
    """All tests of the mixture of experts lean on this: were one expert taken always, they would see little."""
    model, chosen = reference(form), {}
    routers = {name: module for name, module in model.named_modules() if name.endswith("router")}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: chosen.update({name: out.argmax(-1)}))
        for name, module in routers.items()
    ]
    model.logits(torch.randint(0, 320, (1, 256), generator=torch.Generator().manual_seed(2)))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == {"scout": 5, "maverick": 2, "topk2": 5}[form]
    for name, experts in chosen.items():
        share = experts.flatten().bincount(minlength=8) / 256
        assert (share > 0).sum() >= 7, f"{name}: {share.tolist()}"
        assert share.max() < 0.5, f"{name}: {share.tolist()}"
