"""The sparse routed experts equal the dense formula that computes every expert for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from corral.model.text import Experts
from corral.spec.model_config import parse_config


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_sparse_sum_equals_dense_sum(k: int, tokens: int, tiny_config: Callable[[str], dict[str, Any]]) -> None:
    experts = Experts(parse_config(tiny_config("scout") | {"num_experts_per_tok": k})).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x_TH = torch.randn(tokens, 64, dtype=torch.float64, generator=generator)
    logits_TE = torch.randn(tokens, 8, dtype=torch.float64, generator=generator)

    dense_TH = torch.zeros_like(x_TH)
    for t in range(tokens):
        for e in logits_TE[t].topk(k).indices:
            seen = x_TH[t] * torch.sigmoid(logits_TE[t, e].float())  # the gate scales the input, in float32
            gate, up = (seen @ experts.gate_up_proj[e]).split(64)
            dense_TH[t] += (F.silu(gate) * up) @ experts.down_proj[e]

    error = (experts(x_TH, logits_TE) - dense_TH).abs().max() / dense_TH.abs().max()
    assert error < 1e-6  # the gate's float32 rounding


def test_one_expert_may_take_every_token(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    experts = Experts(parse_config(tiny_config("scout")))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(6))
    x_TH, logits_TE = torch.ones(4, 64), torch.eye(8)[[5, 5, 5, 5]] * 3
    with torch.no_grad():
        out_TH = experts(x_TH, logits_TE)
    assert out_TH.abs().max() > 0
    assert torch.equal(out_TH, out_TH[:1].expand_as(out_TH))
