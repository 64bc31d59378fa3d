"""Decode a few tokens with a bundle of any size, and hold every step's logits against PyTorch on the same weights.

    python benchmarks/full_size_logits.py synthetic:scout /tmp/scout

The reference is the model's own layers, one after the other, each weight read from the checkpoint by slice, rounded as
the recipe says by a second implementation, used and forgotten (of the experts, those that tokens choose): it needs a few
GB for a model of any size. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.text import DecoderLayer, Experts, Llama4Text
from corral.runtime import LLM, SamplingParams
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import Caches, Float32, Session, Step
from corral.spec.bundle import open_bundle
from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import ModelConfig
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Source

PROMPT, STEPS = 12, 4
BITS = {"fp32": None, "int8": 8, "int4": 4}


class Recorder:
    """A session that remembers each step's logits and seconds."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.logits: list[Float32] = []
        self.seconds: list[float] = []

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> Caches:
        return self.session.new_caches(layouts, max_context)

    def run(self, step: Step) -> Float32:
        started = time.monotonic()
        logits = self.session.run(step)
        self.seconds.append(round(time.monotonic() - started, 1))
        print(f"step of {step.positions_BS.size} tokens: {self.seconds[-1]} s", file=sys.stderr)
        self.logits.append(logits[0, -1].copy())
        return logits

    def release(self) -> None:
        self.session.release()


class Weights:
    """The checkpoint's matrices as a bundle of `recipe` has them, dequantized."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self.checkpoint, self.group, self.bits = checkpoint, recipe.group_size, BITS[recipe.weights]

    def matrix(self, name: str, expert: int | None = None) -> Tensor:
        """[outputs, inputs]"""
        shape = self.checkpoint.info(name).shape[-2:]
        rows, columns = shape if expert is None else shape[::-1]
        source = Source(
            self.checkpoint.source(name), (0, rows), (0, columns), index=expert, transposed=expert is not None
        )
        values = torch.from_numpy(self.checkpoint.read(source))
        return values if "router" in name or "embed" in name else self.rounded(values)

    def vector(self, name: str) -> Tensor:
        size = self.checkpoint.info(name).shape[0]
        return torch.from_numpy(self.checkpoint.read(Source(self.checkpoint.source(name), (0, size))))

    def rounded(self, values: Tensor) -> Tensor:
        if self.bits is None:
            return values
        limit = 2 ** (self.bits - 1) - 1
        groups = values.unflatten(-1, (-1, self.group))
        scale = groups.abs().amax(-1, keepdim=True) / limit
        return ((groups / scale).round_().clamp_(-limit, limit).mul_(scale)).flatten(-2)


class ExpertsOnDemand(Experts):
    """The routed experts, whose weights are there only while one computes."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        nn.Module.__init__(self)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.gate_up_proj = range(config.num_local_experts)  # type: ignore[assignment]  # its length is asked for
        self.weights, self.name = weights, name

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.weights.matrix(f"{self.name}.gate_up_proj", expert).T).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.weights.matrix(f"{self.name}.down_proj", expert).T


def layer(config: ModelConfig, weights: Weights, i: int) -> DecoderLayer:
    facts = config.layers[i]
    with torch.device("meta"):
        made = DecoderLayer(config, facts)
    if facts.moe:
        made.feed_forward.experts = ExpertsOnDemand(config, weights, f"layers.{i}.feed_forward.experts")
    state = {
        name: (weights.vector if parameter.dim() == 1 else weights.matrix)(f"layers.{i}.{name}")
        for name, parameter in made.named_parameters()
    }
    made.load_state_dict(state, assign=True)
    return made.eval()


def reference_logits(checkpoint: Checkpoint, recipe: Recipe, ids: list[int], rows: range) -> Tensor:
    """Teacher-forced logits [rows, vocab] of one sequence."""
    config, weights = checkpoint.config, Weights(checkpoint, recipe)
    with torch.device("meta"):
        whole = Llama4Text(config)
    positions_BS = torch.arange(len(ids))[None]
    rotary = Llama4Text.rotary(whole, positions_BS)
    tensor = checkpoint.source("embed_tokens.weight")
    x_BSH = torch.stack(
        [torch.from_numpy(checkpoint.read(Source(tensor, (i, i + 1), (0, config.hidden_size)))[0]) for i in ids]
    )[None]
    for i in range(config.num_layers):
        x_BSH, _, _ = layer(config, weights, i)(x_BSH, rotary, positions_BS, None, None, None)
        print(f"reference: layer {i}", file=sys.stderr)
    norm = nn.functional.rms_norm(x_BSH[0, list(rows)], (config.hidden_size,), eps=config.rms_norm_eps)
    norm *= weights.vector("norm.weight")
    return norm @ weights.matrix("lm_head.weight").T


def main(checkpoint_name: str, bundle_name: str) -> None:
    checkpoint, bundle = open_checkpoint(checkpoint_name), open_bundle(Path(bundle_name))
    recipe = bundle.manifest.recipe
    prompt = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, PROMPT).tolist()
    started = time.monotonic()
    recorder = Recorder(OnnxRuntimeSession(bundle))
    opened = time.monotonic() - started
    llm = LLM(bundle, session=recorder)
    answer = llm.generate([prompt], SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True))[0]
    del llm
    ids = [*prompt, *answer.token_ids[:-1]]
    with torch.inference_mode():
        want = reference_logits(checkpoint, recipe, ids, range(PROMPT - 1, len(ids))).numpy()
    got = np.stack(recorder.logits)
    scale = np.abs(want).max()
    print(
        json.dumps(
            {
                "tokens": answer.token_ids,
                "reference_tokens": want.argmax(-1).tolist(),
                "max_error_of_scale": [float(f"{e:.3g}") for e in np.abs(got - want).max(-1) / scale],
                "seconds_to_open": round(opened, 1),
                "seconds_per_step": recorder.seconds,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
