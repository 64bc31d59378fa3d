"""What a model needs before a byte of it is read: sizes, memory, GPUs, tokens a second, cost. Formulas, no measurement.

Stages are ranges of layers, one a GPU, and work one after another: a token's bytes are read at one GPU's bandwidth.
The embedding stays on the host, where it is gathered from a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from corral.spec.errors import InputError
from corral.spec.gpus import Gpu
from corral.spec.kv_layout import kv_layouts
from corral.spec.layer_ranges import fitting_ranges
from corral.spec.machine import usable_cores
from corral.spec.model_config import ModelConfig
from corral.spec.parameters import active_parameters, layer_parameters, parameters
from corral.spec.storage import stored_bytes
from corral.spec.weight_plan import JOB_BYTES_PER_ELEMENT, JOB_ELEMENTS, PROCESS_BYTES

KV_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8e4m3fn", "int8": "int8", "int4": "int4"}
USABLE = 0.92  # of a GPU's memory; the rest is the driver's context, the allocator's holes, code
PREFILL_TOKENS = 2048  # activations are those of so many tokens at once


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is to be stored and served."""

    weights: str = "int4"
    group_size: int = 128
    dtype: str = "bfloat16"  # of the checkpoint
    context: int = 131072
    batch: int = 1
    kv: str = "bf16"
    price_per_hour: float | None = None  # of one GPU


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All figures for one way of storing one model; bytes, and None where the model does not fit."""

    config: ModelConfig
    serving: Serving
    gpu: Gpu
    weights: dict[str, int]  # kind -> bytes
    kv: dict[str, int]  # KV class -> bytes
    activations: int
    gpus: int | None
    bytes_per_token: int

    @property
    def weights_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def kv_bytes(self) -> int:
        return sum(self.kv.values())

    @property
    def vram_bytes(self) -> int:
        """Of all GPUs together, were there one stage."""
        return self.weights_bytes - self.weights["embedding"] + self.kv_bytes + self.activations

    @property
    def fits(self) -> bool:
        """On one GPU, or on the host where the GPU is a host."""
        return self.gpus is not None and self.gpus <= max(self.gpu.count, 1)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, bound by memory bandwidth: an upper limit."""
        return self.serving.batch * self.gpu.bandwidth / self.bytes_per_token

    @property
    def cost_per_million(self) -> float | None:
        if self.serving.price_per_hour is None or self.gpus is None:
            return None
        return self.serving.price_per_hour * max(self.gpus, self.gpu.count) / 3600 / self.tokens_per_second * 1e6

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": {
                "total": parameters(self.config).total(),
                "active": active_parameters(self.config),
                "by_kind": dict(parameters(self.config)),
            },
            "weights": self.serving.weights,
            "weights_by_kind": self.weights,
            "weights_bytes": self.weights_bytes,
            "disk_bytes": self.weights_bytes,
            "context": self.serving.context,
            "batch": self.serving.batch,
            "kv_bytes": self.kv_bytes,
            "kv_by_class": self.kv,
            "activation_bytes": self.activations,
            "vram_bytes": self.vram_bytes,
            "compile_peak_bytes": compile_peak_bytes(usable_cores()),
            "gpu": self.gpu.name,
            "fits": self.fits,
            "gpus_needed": self.gpus,
            "stages": self.gpus,
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_second_bound": self.tokens_per_second,
            "cost_per_million_tokens": self.cost_per_million,
        }


def estimate(config: ModelConfig, serving: Serving, gpu: Gpu) -> Estimate:
    """Work everything out. Raises InputError for a context beyond the model's, or a batch below one."""
    if not 1 <= serving.context <= config.max_position_embeddings:
        raise InputError(f"context is {serving.context}, expected 1 to the model's {config.max_position_embeddings}.")
    if serving.batch < 1 or (serving.price_per_hour is not None and not 0 < serving.price_per_hour < math.inf):
        raise InputError(
            f"batch is {serving.batch} and price per hour {serving.price_per_hour}; expected at least 1, and above 0."
        )
    if serving.kv not in KV_DTYPES:
        raise InputError(f'kv "{serving.kv}" is not known; expected one of {", ".join(KV_DTYPES)}.')
    weights = _stored(parameters(config), serving)
    if config.tie_word_embeddings:  # the head is the same numbers, stored once more as a matrix
        weights |= _stored(Counter({"head": config.vocab_size * config.hidden_size}), serving)
    kv = {
        str(layout.kv_class): serving.batch * layout.bytes(serving.context)
        for layout in (dataclasses.replace(layout, dtype=KV_DTYPES[serving.kv]) for layout in kv_layouts(config))
    }
    activations = _activations(config, serving)
    return Estimate(
        config=config,
        serving=serving,
        gpu=gpu,
        weights=weights,
        kv=kv,
        activations=activations,
        gpus=_stages(config, serving, weights, kv, int(gpu.memory_bytes * USABLE) - activations, gpu.count),
        bytes_per_token=_read(config, serving, weights) + sum(kv.values()),
    )


def compile_peak_bytes(processes: int) -> int:
    """Memory of a compile with so many processes: theirs and the parent's, each of theirs with one largest job.

    It does not depend on the model: every matrix, an expert's too, is cut to jobs of JOB_ELEMENTS.
    """
    return PROCESS_BYTES + processes * (PROCESS_BYTES + JOB_ELEMENTS * JOB_BYTES_PER_ELEMENT)


def _stored(counts: Counter[str], serving: Serving) -> dict[str, int]:
    return stored_bytes(counts, serving.weights, serving.group_size, serving.dtype)


def _activations(config: ModelConfig, serving: Serving) -> int:
    """Widest layer of a prefill in 16 bit, the residual in 32 bit, and logits of one row a sequence in 32 bit."""
    tokens = min(serving.context, PREFILL_TOKENS)
    widest = max(
        3 * max(config.intermediate_size_mlp, config.intermediate_size), config.query_size + 2 * config.kv_size
    )
    return tokens * (2 * widest + 8 * config.hidden_size) + 4 * serving.batch * config.vocab_size


def _read(config: ModelConfig, serving: Serving, weights: dict[str, int]) -> int:
    """Bytes of weights that one step of the batch reads: of the routed experts, those expected to be chosen at all."""
    fixed = sum(size for kind, size in weights.items() if kind not in ("embedding", "experts"))
    if not weights.get("experts"):
        return fixed
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** serving.batch
    return fixed + round(weights["experts"] * (1 - missed))


def _stages(
    config: ModelConfig, serving: Serving, weights: dict[str, int], kv: dict[str, int], room: int, limit: int
) -> int | None:
    """The fewest GPUs that hold all layers in order, one range each; None where a layer alone, or a host, is too small."""
    count = Counter(layer.kv_class for layer in config.layers)
    parts = [
        sum(_stored(layer_parameters(config, layer), serving).values()) + kv[layer.kv_class] // count[layer.kv_class]
        for layer in config.layers
    ] + [weights["head"]]
    stages = fitting_ranges(parts, room)
    return None if stages is None or (limit and len(stages) > limit) else len(stages)
