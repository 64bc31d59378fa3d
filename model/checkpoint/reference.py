"""Load a checkpoint into the reference model: what accuracy is measured against."""

from __future__ import annotations

import torch

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.model.text import Llama4Text


def load_reference(checkpoint: Checkpoint) -> Llama4Text:
    """The whole model in float32, without gradients. Needs 4 bytes of memory per parameter."""
    with torch.device("meta"):
        model = Llama4Text(checkpoint.config)
    state = {name: tensor.float() for name, tensor in checkpoint.state_dict().items()}
    tied = checkpoint.config.tie_word_embeddings
    model.load_state_dict(state | ({HEAD: state[EMBEDDING]} if tied else {}), assign=True)
    if tied:  # assigning made two parameters of one
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval().requires_grad_(False)
