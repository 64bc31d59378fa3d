"""Train demo-scout: a small Llama 4 in the Scout form, on Python's own standard library source, on a CPU.

    python demo/train.py WORK_DIR --tokens 20_000_000        # resumes from WORK_DIR; writes a checkpoint every 2 minutes
    python demo/train.py WORK_DIR --export demo/demo-scout   # bf16 safetensors, tokenizer, held-out text, card

The learning rate is warmed up, held, and brought to zero over the last third of `--tokens`; training may be stopped and
resumed with another `--tokens`, for example to begin that last third sooner.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import split
from tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, save_tokenizer, train_tokenizer
from torch import Tensor, nn

from corral.model.text import Llama4Text, MoE
from corral.spec.model_config import parse_config

CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 512,
    },
    "attention_chunk_size": 128,
    "attn_temperature_tuning": True,
    "floor_scale": 128,
    "attn_scale": 0.1,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": SPECIAL_TOKENS.index("<|begin_of_text|>"),
    "eos_token_id": [SPECIAL_TOKENS.index("<|end_of_text|>"), SPECIAL_TOKENS.index("<|eot|>")],
    "pad_token_id": SPECIAL_TOKENS.index("<|finetune_right_pad|>"),
    "torch_dtype": "bfloat16",
}
SEQUENCE = 512  # tokens: four chunks
BATCH = 8  # sequences
PEAK_RATE = 3e-3
BALANCE = 0.01  # weight of the load-balancing loss
WARM_UP_STEPS = 100
DECAY_FROM = 0.67  # of all tokens
SAVE_EVERY = 120.0  # seconds


@dataclass
class Data:
    """Token streams; files are separated by <|end_of_text|> and begin with <|begin_of_text|>."""

    train: Tensor
    held_out: Tensor
    held_out_text: str


def prepare(work: Path) -> Data:
    """Train the tokenizer and encode the corpus, once."""
    cached = work / "data.pt"
    if not cached.exists():
        train_texts, held_out_texts = split()
        tokenizer = train_tokenizer(train_texts)
        save_tokenizer(tokenizer, work)
        end = tokenizer.token_to_id("<|end_of_text|>")

        def encode(texts: list[str]) -> Tensor:
            encoded = tokenizer.encode_batch(texts)
            return torch.tensor([i for e in encoded for i in [*e.ids, end]], dtype=torch.int32)

        torch.save(
            {"train": encode(train_texts), "held_out": encode(held_out_texts), "text": "\n".join(held_out_texts)},
            cached,
        )
    data = torch.load(cached, weights_only=True)
    return Data(data["train"], data["held_out"], data["text"])


def initialize(model: Llama4Text) -> None:
    """Normal weights of standard deviation 1/sqrt(fan in), output projections of a residual block scaled down by depth."""
    depth = (2 * model.config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter.shape[-2]
        std = 0.02 if name == "embed_tokens.weight" else fan_in**-0.5
        nn.init.normal_(
            parameter, std=std * (depth if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1)
        )


class RouterWatch:
    """Collects router logits of every MoE layer of the last forward pass."""

    def __init__(self, model: Llama4Text) -> None:
        self.logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.register_forward_hook(lambda _m, _i, out: self.logits.append(out.flatten(0, -2)))

    def balance_loss(self) -> Tensor:
        """Switch Transformer load-balancing loss (Fedus et al. 2021, eq. 4), mean over layers; 1 when even."""
        losses = []
        for logits in self.logits:
            experts = logits.shape[-1]
            share = F.one_hot(logits.argmax(-1), experts).float().mean(0)
            losses.append(experts * (share * logits.float().softmax(-1).mean(0)).sum())
        return torch.stack(losses).mean()

    def histogram(self) -> Tensor:
        """Share of tokens per expert, [layers, E]."""
        return torch.stack([F.one_hot(x.argmax(-1), x.shape[-1]).float().mean(0) for x in self.logits])


def learning_rate(step: int, fraction: float) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = 1.0 if fraction < DECAY_FROM else max(0.0, (1 - fraction) / (1 - DECAY_FROM))
    return PEAK_RATE * warm * decay


def cross_entropy(model: Llama4Text, ids: Tensor) -> Tensor:
    logits = model.logits(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Llama4Text, watch: RouterWatch, held_out: Tensor, tokens: int) -> tuple[float, Tensor]:
    """(mean nats per token, expert histogram) over the first `tokens` held-out tokens in windows of SEQUENCE."""
    windows = held_out[: tokens // SEQUENCE * SEQUENCE + 1].long().unfold(0, SEQUENCE + 1, SEQUENCE)
    losses, histograms = [], []
    for batch in windows.split(BATCH):
        watch.logits.clear()
        losses.append(cross_entropy(model, batch).item() * len(batch))
        histograms.append(watch.histogram() * len(batch))
    watch.logits.clear()
    return sum(losses) / len(windows), torch.stack(histograms).sum(0) / len(windows)


def train(work: Path, total_tokens: int) -> None:
    data = prepare(work)
    torch.manual_seed(0)
    model = Llama4Text(parse_config(CONFIG))
    initialize(model)
    watch = RouterWatch(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    step, log = 0, []
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log = state["step"], state["log"]
    per_step = BATCH * SEQUENCE
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(data.train) / 1e6:.1f} M training "
          f"tokens, {len(data.held_out) / 1e3:.0f} k held out; step {step}", flush=True)  # fmt: skip
    started = saved = time.monotonic()
    first, running = step, None
    while step * per_step < total_tokens:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(data.train) - SEQUENCE - 1, (BATCH,), generator=generator)
        batch = torch.stack([data.train[s : s + SEQUENCE + 1] for s in starts.tolist()]).long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step * per_step / total_tokens)
        watch.logits.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model, batch)
        (loss + BALANCE * watch.balance_loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            speed = (step - first) * per_step / (time.monotonic() - started)
            uneven = (watch.histogram().max() * 16).item()
            print(f"step {step}  {step * per_step / 1e6:.2f} M tokens  loss {running:.3f}  busiest expert x{uneven:.1f}  "
                  f"{speed:.0f} tokens/s", flush=True)  # fmt: skip
            if not math.isfinite(running):
                raise SystemExit("the loss is not finite")
        last = step * per_step >= total_tokens
        if last or time.monotonic() - saved > SAVE_EVERY:
            loss_now, histogram = held_out_loss(model, watch, data.held_out, 40_000)
            log.append({"step": step, "tokens": step * per_step, "held_out": loss_now})
            print(f"held-out {loss_now:.4f} nats/token; share of the busiest expert by layer "
                  f"{[round(x, 3) for x in histogram.max(1).values.tolist()]}", flush=True)  # fmt: skip
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "log": log}
            torch.save(state, work / "state.tmp")
            os.replace(work / "state.tmp", work / "state.pt")
            saved = time.monotonic()


def export(work: Path, out: Path) -> None:
    """Write the trained model as a Hugging Face checkpoint in bf16, with its card and the held-out text."""
    from safetensors.torch import save_file

    data = prepare(work)
    state = torch.load(work / "state.pt", weights_only=True)
    model = Llama4Text(parse_config(CONFIG))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state["model"].items()}
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    loss, histogram = held_out_loss(model, RouterWatch(model), data.held_out, len(data.held_out))
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {("" if name == "lm_head.weight" else "model.") + name: tensor for name, tensor in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((work / name).read_bytes())
    (out / "heldout.txt").write_text(data.held_out_text, encoding="utf-8")
    trained = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": state["log"][-1]["tokens"],
        "held_out_tokens": len(data.held_out),
        "held_out_nats_per_token": round(loss, 4),
        "expert_share_by_layer": [[round(share, 4) for share in layer] for layer in histogram.tolist()],
        "held_out_curve": state["log"],
    }
    (out / "training.json").write_text(json.dumps(trained, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in trained.items() if k != "held_out_curve"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=20_000_000)
    parser.add_argument("--export", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(arguments.work, arguments.export)
    else:
        train(arguments.work, arguments.tokens)


if __name__ == "__main__":
    main()
