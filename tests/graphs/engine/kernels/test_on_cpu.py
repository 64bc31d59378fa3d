"""The CUDA sources against the model's own eager `Experts`, run on the CPU thread by thread: results, bounds, determinism."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corral.graphs.engine.kernels.launch import DECODE, FORMATS, PREFILL, TILINGS, MoeShape, Tiling, buffers, launches
from corral.graphs.execute.steps import STEPS
from corral.graphs.quantize.rtn import rtn
from corral.model.checkpoint.checkpoint import alternating
from corral.model.text import Experts
from corral.spec.model_config import parse_config

from .conftest import RunOnCpu, forbid, guarded

Array = NDArray[Any]
TinyConfig = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """Experts as the kernels store them, and the values they stand for: [E, inputs, outputs], as the model has them."""

    stored: dict[str, Array]
    gate_up: Array
    down: Array


def quantized(matrix: Array, shape: MoeShape) -> tuple[Array, Array | None, Array]:
    """Codes, scales and values of one matrix [outputs, inputs]."""
    if shape.weights == "fp16":
        values = matrix.astype(np.float16)
        return values, None, values.astype(np.float64)
    if shape.weights == "fp8":
        fp8 = STEPS["e4m3"](matrix)
        values = fp8["codes"].astype(np.float64) * fp8["scales"]
        return fp8["codes"].view(np.uint8), fp8["scales"], values
    int4 = rtn(matrix, bits=4, group_size=shape.group_size)
    scales = np.repeat(int4["scales"].astype(np.float16), shape.group_size, axis=1)
    dequantized = (
        int4["codes"].astype(np.float16) - np.float16(8)
    ) * scales  # rounded to fp16, as DequantizeLinear does
    return int4["codes"], int4["scales"], dequantized.astype(np.float64)


def in_runs(matrix: Array, run: int) -> Array:
    """As a plan's sources with `interleave` are read."""
    gate, up = np.split(matrix, 2)
    return alternating(gate, up, run)


def make_weights(shape: MoeShape, rng: np.random.Generator) -> Weights:
    stored: dict[str, list[Array]] = {}
    values: dict[str, list[Array]] = {"gate_up": [], "down": []}
    bits = shape.format.bits
    for _ in range(shape.experts):
        for name, outputs, inputs, run in (
            ("gate_up", 2 * shape.width, shape.hidden, 8),
            ("down", shape.hidden, shape.width, shape.hidden // 2),  # as it is
        ):
            matrix = rng.standard_normal((outputs, inputs)).astype(np.float32) / np.float32(np.sqrt(inputs))
            codes, scales, dequantized = quantized(matrix, shape)
            values[name].append(dequantized.T)
            packed = STEPS["pack_fragments"](in_runs(codes, run), bits=bits)
            stored.setdefault(f"{name}.codes", []).append(packed)
            if scales is not None:
                laid = STEPS["fragment_scales"](in_runs(scales, run), dtype=shape.format.scale_dtype)
                stored.setdefault(f"{name}.scales", []).append(laid)
    arrays = {name: np.stack(experts) for name, experts in stored.items()}
    return Weights(arrays, np.stack(values["gate_up"]), np.stack(values["down"]))


def make_buffers(shape: MoeShape, weights: Weights, x: Array, logits: Array) -> dict[str, Array]:
    """Every buffer, each ending at a forbidden page; what kernels write starts as NaN or -1."""
    given_values = {"x": x, "logits": logits, **weights.stored}
    made = {}
    for name, (dtype, extent) in buffers(shape, len(x)).items():
        blank = np.full(int(np.prod(extent)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(extent)
        value = given_values.get(name, blank)
        assert value.dtype == np.dtype(dtype) and value.shape == extent, name
        made[name] = guarded(value)
    return made


def eager(shape: MoeShape, weights: Weights, x: Array, logits: Array, tiny_config: TinyConfig) -> Array:
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    experts = Experts(parse_config(tiny_config("scout") | sizes)).double()
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.from_numpy(weights.gate_up))
        experts.down_proj.copy_(torch.from_numpy(weights.down))
        return experts(torch.from_numpy(x).double(), torch.from_numpy(logits).double()).numpy()


def run_all(run_on_cpu: RunOnCpu, shape: MoeShape, tiling: Tiling, made: dict[str, Array], seed: int = 1) -> Array:
    """All three kernels; returns y summed over each token's visits, as the graph does it."""
    tokens = len(made["x"])
    for launch in launches(shape, tokens, tiling):
        run_on_cpu(launch, made, seed)
    return made["y"].astype(np.float64).reshape(tokens, shape.top_k, shape.hidden).sum(axis=1)


def random_tokens(shape: MoeShape, tokens: int, rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.standard_normal((tokens, shape.hidden)).astype(np.float16)
    return x, rng.standard_normal((tokens, shape.experts)).astype(np.float32)


def assert_close(actual: Array, expected: Array) -> None:
    # h is rounded to fp16 once between the two products, y once at the end: half an fp16 step (2^-11) of y's size each,
    # the first averaged over the width. Sums are exact to fp32.
    size = np.sqrt((expected**2).mean())
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= 2**-10 * np.maximum(np.abs(expected), 2 * size).max()


FORMAT_CASES = [("int4", 32), ("int4", 64), ("int4", 128), ("fp8", 0), ("fp16", 0)]


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
@pytest.mark.parametrize(("weights", "group_size"), FORMAT_CASES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_kernels_equal_the_eager_experts(
    weights: str, group_size: int, tiling: Tiling, tokens: int, run_on_cpu: RunOnCpu, tiny_config: TinyConfig
) -> None:
    shape = MoeShape(hidden=128, width=128, experts=8, top_k=1, weights=weights, group_size=group_size)
    rng = np.random.default_rng(tokens)
    stored = make_weights(shape, rng)
    x, logits = random_tokens(shape, tokens, rng)
    if tokens == 70:
        assert len(set(logits.argmax(axis=1))) == 8, "every expert is visited"
    made = make_buffers(shape, stored, x, logits)
    assert_close(run_all(run_on_cpu, shape, tiling, made), eager(shape, stored, x, logits, tiny_config))


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
@pytest.mark.parametrize(
    ("hidden", "width", "experts", "top_k"),
    [
        (64, 64, 8, 1),  # fewer steps than warps that share them
        (3072, 64, 8, 1),  # gate and up go round the ring of steps in shared memory, also where 8 warps share them
        (64, 3072, 8, 1),  # down does
        (192, 320, 16, 2),  # rows and steps that do not fill a block, two experts a token
        (64, 64, 40, 3),  # more experts than lanes
    ],
)
def test_other_sizes_equal_the_eager_experts(
    hidden: int, width: int, experts: int, top_k: int, tiling: Tiling, run_on_cpu: RunOnCpu, tiny_config: TinyConfig
) -> None:
    shape = MoeShape(hidden=hidden, width=width, experts=experts, top_k=top_k, weights="int4", group_size=64)
    rng = np.random.default_rng(11)
    stored = make_weights(shape, rng)
    x, logits = random_tokens(shape, 9, rng)
    made = make_buffers(shape, stored, x, logits)
    assert_close(run_all(run_on_cpu, shape, tiling, made), eager(shape, stored, x, logits, tiny_config))


SMALL = MoeShape(hidden=128, width=128, experts=8, top_k=1, weights="int4", group_size=128)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
@pytest.mark.parametrize("visited", [(3,), (0, 7), (2, 3, 4)])
def test_an_expert_that_nobody_visits_is_never_read(
    visited: tuple[int, ...], tiling: Tiling, run_on_cpu: RunOnCpu, tiny_config: TinyConfig
) -> None:
    rng = np.random.default_rng(3)
    stored = make_weights(SMALL, rng)
    x, logits = random_tokens(SMALL, 130, rng)  # one expert alone: three tiles of 64
    logits[:, visited] += 20
    assert set(logits.argmax(axis=1)) == set(visited)
    made = make_buffers(SMALL, stored, x, logits)
    for name in ("gate_up.codes", "down.codes"):
        for expert in set(range(SMALL.experts)) - set(visited):
            assert made[name][expert].nbytes % mmap.PAGESIZE == 0
            forbid(made[name][expert])
    assert_close(run_all(run_on_cpu, SMALL, tiling, made), eager(SMALL, stored, x, logits, tiny_config))


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
def test_the_order_of_threads_does_not_change_a_bit(tiling: Tiling, run_on_cpu: RunOnCpu) -> None:
    rng = np.random.default_rng(4)
    stored = make_weights(SMALL, rng)
    x, logits = random_tokens(SMALL, 40, rng)
    results = []
    for seed in range(1, 5):
        made = make_buffers(SMALL, stored, x, logits)
        run_all(run_on_cpu, SMALL, tiling, made, seed)
        results.append(b"".join(made[name].tobytes() for name in ("expert", "visit", "gate", "offset", "h", "y")))
    assert len(set(results)) == 1


def test_a_token_is_the_same_alone_and_among_others(run_on_cpu: RunOnCpu) -> None:
    rng = np.random.default_rng(5)
    stored = make_weights(SMALL, rng)
    x, logits = random_tokens(SMALL, 30, rng)
    together = run_all(run_on_cpu, SMALL, DECODE, make_buffers(SMALL, stored, x, logits))
    alone = run_all(run_on_cpu, SMALL, DECODE, make_buffers(SMALL, stored, x[17:18], logits[17:18]))
    assert (together[17] == alone[0]).all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tiling=st.sampled_from(TILINGS))
def test_any_routing_table_stays_within_the_buffers(data: st.DataObject, tiling: Tiling, run_on_cpu: RunOnCpu) -> None:
    # TensorRT times a plugin on whatever its input buffers hold. The pages after each buffer may not be touched.
    tokens = data.draw(st.integers(1, 20))
    anything = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, tokens + 2))
    rng = np.random.default_rng(6)
    made = make_buffers(SMALL, make_weights(SMALL, rng), *random_tokens(SMALL, tokens, rng))
    for name in ("visit", "offset"):
        made[name][...] = data.draw(st.lists(anything, min_size=made[name].size, max_size=made[name].size))
    for launch in launches(SMALL, tokens, tiling)[1:]:
        run_on_cpu(launch, made)


def test_nan_and_infinity_reach_the_output_of_their_token_alone(run_on_cpu: RunOnCpu) -> None:
    rng = np.random.default_rng(7)
    stored = make_weights(SMALL, rng)
    x, logits = random_tokens(SMALL, 12, rng)
    clean = run_all(run_on_cpu, SMALL, PREFILL, make_buffers(SMALL, stored, x, logits))
    x[3, 5], logits[8, 2], x[10, 0] = np.nan, np.nan, np.inf
    spoilt = run_all(run_on_cpu, SMALL, PREFILL, make_buffers(SMALL, stored, x, logits))
    hurt = ~np.isfinite(spoilt).all(axis=1)
    assert set(np.flatnonzero(hurt)) == {3, 8, 10}
    assert np.isnan(spoilt[8]).all()
    assert (spoilt[~hurt] == clean[~hurt]).all()


def test_formats_are_all_tested() -> None:
    assert {weights for weights, _ in FORMAT_CASES} == set(FORMATS)
