"""One decoder layer over the whole calibration text, its experts one at a time, while its matrices' inputs are summed.

    hidden states before ─► attention ─► between ─► dense or shared feed-forward, router ─► after
                                           └─► expert 0, expert 1, … (each over all of its tokens) ─► added to after

Hidden states [windows, window, H] lie on disk. In memory are the layer without its experts, one expert, the sums of the
matrices of one step, and a block of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from corral.graphs.calibrate.input_sums import InputSums, Products
from corral.graphs.calibrate.statistics import input_site
from corral.model.text import DecoderLayer, MoE, Rotary, route

BLOCK_TOKENS = 2048

Hidden = NDArray[np.float32]
Save = Callable[[str, int | None, InputSums], None]  # site, expert, what was summed
Read = Callable[[str, int], Tensor]  # parameter, expert -> its matrix [outputs, inputs]


def run_layer(
    layer: DecoderLayer,
    name: str,
    rotary: Callable[[Tensor], Rotary],
    before: Hidden,
    between: Hidden,
    after: Hidden,
    *,
    read_expert: Read,
    save: Save,
    products: Products,
    progress: Callable[[float], None],
) -> None:
    """Fill `after` with the hidden states behind the layer called `name`, and `save` the sums of each of its sites.

    `layer` holds all weights but its experts', which `read_expert` gives. `progress` hears shares of the layer, 0 to 1.
    """
    windows, window, _ = before.shape
    blocks = list(_blocks(windows, max(1, BLOCK_TOKENS // window)))
    with _summing(layer.self_attn, f"{name}.self_attn", products, save):
        for i, block in enumerate(blocks):
            x = torch.from_numpy(before[block].copy())
            positions = torch.arange(window).expand(x.shape[:2])
            attended, _, _ = layer.self_attn(layer.input_layernorm(x), rotary(positions), positions, None, None, None)
            between[block] = (x + attended).numpy()
            progress((i + 1) / len(blocks) / 3)
    forward = layer.feed_forward
    dense = forward.shared_expert if isinstance(forward, MoE) else forward
    path = f"{name}.feed_forward" + (".shared_expert" if isinstance(forward, MoE) else "")
    logits = []
    with _summing(dense, path, products, save):
        for i, block in enumerate(blocks):
            x = torch.from_numpy(between[block])
            normed = layer.post_attention_layernorm(x)
            after[block] = (x + dense(normed)).numpy()
            if isinstance(forward, MoE):
                logits.append(forward.router(normed).flatten(0, 1))
            progress((1 + (i + 1) / len(blocks)) / 3)
    if isinstance(forward, MoE):
        _run_experts(layer, forward, f"{name}.feed_forward.experts", torch.cat(logits), between, after,
                     read_expert=read_expert, save=save, products=products, progress=progress)  # fmt: skip


def _run_experts(
    layer: DecoderLayer,
    moe: MoE,
    name: str,
    logits_TE: Tensor,
    between: Hidden,
    after: Hidden,
    *,
    read_expert: Read,
    save: Save,
    products: Products,
    progress: Callable[[float], None],
) -> None:
    size = between.shape[-1]
    between_TH, after_TH = between.reshape(-1, size), after.reshape(-1, size)
    token, gate, visits = route(logits_TE, moe.experts.num_experts_per_tok)
    mine = zip(token.split(visits), gate.split(visits), strict=True)
    parts = f"{name}.gate_up_proj", f"{name}.down_proj"
    sizes = size, moe.experts.down_proj.shape[1]
    together = [InputSums(inputs, "none") for inputs in sizes]
    for expert, (tokens, gates) in enumerate(mine):
        gate_up, down = (read_expert(part, expert) for part in parts)
        seen = [InputSums(inputs, products) for inputs in sizes]
        for block in _blocks(len(tokens), BLOCK_TOKENS):
            rows = tokens[block].numpy()
            x = layer.post_attention_layernorm(torch.from_numpy(between_TH[rows])) * gates[block, None]
            seen[0].add(x)
            together[0].add(x)
            gate_half, up_half = F.linear(x, gate_up).chunk(2, dim=-1)
            middle = F.silu(gate_half) * up_half
            seen[1].add(middle)
            together[1].add(middle)
            after_TH[rows] += F.linear(middle, down).numpy()  # a token visits an expert at most once
        for part, sums in zip(parts, seen, strict=True):
            save(part, expert, sums)
        progress((2 + (expert + 1) / len(visits)) / 3)
    for part, sums in zip(parts, together, strict=True):
        save(part, None, sums)


@contextmanager
def _summing(module: nn.Module, name: str, products: Products, save: Save) -> Iterator[None]:
    """Sum the inputs of a module's matrices while the block runs, each different input once; save them at its end."""
    sums: dict[str, InputSums] = {}
    hooks = []
    for part, child in module.named_modules():
        site = f"{name}.{part}"
        if isinstance(child, nn.Linear) and input_site(site) == site:
            sums[site] = InputSums(child.in_features, products)
            hooks.append(child.register_forward_pre_hook(_adding_to(sums[site])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for site, seen in sums.items():
        save(site, None, seen)


def _adding_to(sums: InputSums) -> Callable[[nn.Module, Sequence[Tensor]], None]:
    return lambda module, inputs: sums.add(inputs[0])


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
