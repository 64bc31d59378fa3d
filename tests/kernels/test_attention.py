"""corral.cpu::Attention against float64, against itself in other batches and pieces, and against bad input.

B sequences, S new tokens, H heads on G key and value heads, D head dim, C cache rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from corral.spec.cpu_ops import DOMAIN, VERSION

pytestmark = pytest.mark.usefixtures("cpu_kernels")

Array = NDArray[Any]
Open = Callable[..., ort.InferenceSession]
EPSILON = 1e-5
EXAMPLES = 8 if "CORRAL_TEST_LIBRARY" in os.environ else 30
INPUTS = ("qkv", "past_key", "past_value", "past_length", "cos", "sin", "temperature")


@dataclass(frozen=True)
class Call:
    """The inputs of one call; those that are None are left out."""

    heads: int
    qkv: Array
    past_key: Array
    past_value: Array
    past_length: Array
    cos: Array | None = None
    sin: Array | None = None
    temperature: Array | None = None
    epsilon: float = 0.0
    kv: str = "float"

    @property
    def feeds(self) -> dict[str, Array]:
        return {name: value for name in INPUTS if (value := getattr(self, name)) is not None}

    def sequences(self, chosen: slice) -> Call:
        parts: dict[str, Any] = {name: np.ascontiguousarray(value[chosen]) for name, value in self.feeds.items()}
        return replace(self, **parts)

    def tokens(self, start: int, stop: int) -> Call:
        """These of the new tokens only, as if those before them were in the cache already."""
        of_token: dict[str, Any] = {
            name: self.feeds[name][:, start:stop] for name in ("qkv", *INPUTS[4:]) if name in self.feeds
        }
        return replace(self, past_length=self.past_length + start, **of_token)


def random_call(
    seed: int, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, past: int, *, rope: bool, tuned: bool
) -> Call:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    angle = rng.uniform(-3, 3, (batch, tokens, dim // 2))
    capacity = past + tokens + int(rng.integers(0, 5))
    return Call(
        heads=heads,
        qkv=normal(batch, tokens, (heads + 2 * kv_heads) * dim),
        past_key=normal(batch, kv_heads, capacity, dim),
        past_value=normal(batch, kv_heads, capacity, dim),
        past_length=rng.integers(0, past + 1, batch),
        cos=np.cos(angle).astype(np.float32) if rope else None,
        sin=np.sin(angle).astype(np.float32) if rope else None,
        temperature=1 + np.abs(normal(batch, tokens)) if tuned else None,
        epsilon=EPSILON if rope and tuned else 0.0,
    )


def session(open_session: Open, call: Call, threads: int = 1) -> ort.InferenceSession:
    cache = TensorProto.FLOAT if call.kv == "float" else TensorProto.UINT8
    kinds = dict.fromkeys(INPUTS, TensorProto.FLOAT) | {"past_length": TensorProto.INT64}
    kinds |= dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), cache)
    node = helper.make_node(
        {"float": "Attention", "int8": "AttentionInt8", "int4": "AttentionInt4"}[call.kv],
        [name if name in call.feeds else "" for name in INPUTS],
        ["y", "present_key", "present_value"],
        domain=DOMAIN,
        num_heads=call.heads,
        kv_num_heads=call.past_key.shape[1],
        qk_norm_epsilon=call.epsilon,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kinds[name], None) for name in call.feeds],
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in node.output],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return open_session(helper.make_model(graph, opset_imports=imports, ir_version=10), threads)


def run(open_session: Open, call: Call, threads: int = 1) -> list[Array]:
    return session(open_session, call, threads).run(None, call.feeds)


def true_attention(call: Call) -> tuple[Array, Array, Array]:
    """In float64: the answer, and the caches with the new rows."""
    batch, tokens, _ = call.qkv.shape
    _, key, value = parts_of(call)
    keys, values = call.past_key.astype(np.float64), call.past_value.astype(np.float64)
    for b in range(batch):
        rows = call.past_length[b] + np.arange(tokens)
        keys[b][:, rows], values[b][:, rows] = key[b].transpose(1, 0, 2), value[b].transpose(1, 0, 2)
    return true_attention_on(call, keys, values), keys, values


def true_attention_on(call: Call, keys: Array, values: Array) -> Array:
    """In float64, one query at a time, on caches that hold the new rows already."""
    query, _, _ = parts_of(call)
    if call.temperature is not None:
        query = query * call.temperature[:, :, None, None]
    batch, tokens, heads, dim = query.shape
    y = np.zeros(query.shape)
    for b, s, h in np.ndindex(batch, tokens, heads):
        head, seen = h * keys.shape[1] // heads, call.past_length[b] + s + 1
        scores = keys[b, head, :seen] @ query[b, s, h] / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        y[b, s, h] = weights @ values[b, head, :seen] / weights.sum()
    return y.reshape(batch, tokens, -1)


def parts_of(call: Call) -> tuple[Array, Array, Array]:
    """Queries [B, S, H, D], keys and values [B, S, G, D] of the new tokens, rotated and normed but not tuned."""
    batch, tokens, width = call.qkv.shape
    kv_heads = call.past_key.shape[1]
    dim = width // (call.heads + 2 * kv_heads)
    wide = call.qkv.astype(np.float64).reshape(batch, tokens, -1, dim)
    query, key, value = np.split(wide, [call.heads, call.heads + kv_heads], axis=2)
    return placed(call, query), placed(call, key), value


def placed(call: Call, x: Array) -> Array:
    """Rotated, then normed."""
    if call.cos is not None and call.sin is not None:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = (part.astype(np.float64)[:, :, None] for part in (call.cos, call.sin))
        x = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
    if call.epsilon:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + call.epsilon)
    return x


def error(got: Array, want: Array) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 70]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (5, 1), (6, 2), (7, 7)]),
    dim=st.sampled_from([16, 48, 64, 128]),
    past=st.sampled_from([0, 1, 127, 128, 300]),
    rope=st.booleans(),
    tuned=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_is_exact_to_float32(
    open_session: Open,
    seed: int,
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    past: int,
    rope: bool,
    tuned: bool,
) -> None:
    call = random_call(seed, batch, tokens, *heads, dim, past, rope=rope, tuned=tuned)
    got = run(open_session, call)
    for part, want in zip(got, true_attention(call), strict=True):
        assert error(part, want) < 4e-6


# --- quantized caches ---

LARGEST = {"int8": 127, "int4": 7}
GROUPS = {"int8": 128, "int4": 32}
BITS = {"int8": 8, "int4": 4}


def stored(rows: Array, kv: str) -> Array:
    """[..., D] -> the bytes of cache_rows.h, worked out in float64 from its words."""
    size, largest = min(GROUPS[kv], rows.shape[-1]), LARGEST[kv]
    groups = rows.reshape(*rows.shape[:-1], -1, size).astype(np.float64)
    scales = (np.abs(groups).max(-1) / largest).astype(np.float16)
    safe = np.where(scales > 0, scales, 1).astype(np.float64)[..., None]
    codes = np.clip(np.rint(groups / safe), -largest, largest).astype(np.int64)
    if kv == "int4":
        low, high = np.split(codes + 8, 2, axis=-1)
        codes = low | high << 4
    flat = (codes & 255).astype(np.uint8).reshape(*rows.shape[:-1], -1)
    return np.concatenate([flat, np.ascontiguousarray(scales).view(np.uint8)], axis=-1)


def values_of(rows: Array, kv: str, dim: int) -> Array:
    """The float64 values that stored rows stand for."""
    size = min(GROUPS[kv], dim)
    codes, scales = np.split(rows, [dim * BITS[kv] // 8], axis=-1)
    scales = np.ascontiguousarray(scales).view(np.float16).astype(np.float64)
    groups = codes.reshape(*rows.shape[:-1], dim // size, -1)
    halves = np.concatenate([groups & 15, groups >> 4], axis=-1).astype(np.int64)
    signed = halves - 8 if kv == "int4" else groups.view(np.int8)
    return (signed * scales[..., None]).reshape(*rows.shape[:-1], dim)


def quantized(call: Call, kv: str) -> Call:
    return replace(call, kv=kv, past_key=stored(call.past_key, kv), past_value=stored(call.past_value, kv))


@given(
    seed=st.integers(0, 2**32 - 1),
    kv=st.sampled_from(["int8", "int4"]),
    tokens=st.sampled_from([1, 5, 70]),
    heads=st.sampled_from([(1, 1), (5, 1), (4, 2)]),
    dim=st.sampled_from([16, 32, 64, 128, 256]),
    past=st.sampled_from([0, 127, 300]),
    rope=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_quantized_cache_is_attended_to_as_what_it_stands_for(
    open_session: Open, seed: int, kv: str, tokens: int, heads: tuple[int, int], dim: int, past: int, rope: bool
) -> None:
    """Exactly, of the rows that were stored; and what is stored is off by half a step at most, and one rounding of fp16."""
    exact = random_call(seed, 2, tokens, *heads, dim, past, rope=rope, tuned=rope)
    call = quantized(exact, kv)
    y, key, value = run(open_session, call)
    keys, values = (values_of(rows, kv, dim) for rows in (key, value))
    _, true_keys, true_values = true_attention(exact)
    for b, length in enumerate(call.past_length):
        assert np.array_equal(key[b, :, :length], call.past_key[b, :, :length])
        for got, want in ((keys, true_keys), (values, true_values)):
            groups = want[b, :, length : length + tokens].reshape(-1, min(GROUPS[kv], dim))
            step = np.abs(groups).max(-1, keepdims=True) / LARGEST[kv]
            found = got[b, :, length : length + tokens].reshape(groups.shape)
            assert (np.abs(found - groups) <= 0.5 * step + LARGEST[kv] * 2.0**-11 * step + 1e-6).all()
    # What the kernel attended to are the rows that it stored: no token of its own is in them otherwise.
    want = true_attention_on(exact, keys, values)
    assert error(y, want) < 4e-6


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_rows_are_stored_as_the_words_say(open_session: Open, kv: str) -> None:
    """Values are not turned: their stored bytes are those of a second implementation, but for ties."""
    call = random_call(3, 2, 40, 4, 2, 64, 9, rope=False, tuned=False)
    _, _, value = run(open_session, quantized(call, kv))
    rows = call.qkv[:, :, -2 * 64 :].reshape(2, 40, 2, 64).transpose(0, 2, 1, 3)
    for b, length in enumerate(call.past_length):
        assert (value[b, :, length : length + 40] == stored(rows[b], kv)).mean() > 0.999


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_quantized_bits_do_not_depend_on_batch_pieces_threads_or_instruction_set(
    open_session: Open, forced: Any, kv: str
) -> None:
    whole = quantized(random_call(4, 2, 40, 6, 2, 64, 300, rope=True, tuned=True), kv)
    want = run(open_session, whole)
    assert all(map(np.array_equal, run(open_session, whole, 3), want))
    assert np.array_equal(run(open_session, whole.sequences(slice(1, 2)))[0], want[0][1:])
    _, key, value = run(open_session, whole.tokens(0, 39))
    last = replace(whole.tokens(39, 40), past_key=key, past_value=value)
    assert np.array_equal(run(open_session, last)[0], want[0][:, 39:])
    for instruction_set in ("portable", "avx2", "avx512_vnni"):
        with forced(instruction_set):
            assert all(map(np.array_equal, run(open_session, whole), want))


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-7, 1e-5, 1e5, 1e6, 1e10, np.inf, np.nan])
def test_tiny_and_huge_values_are_stored_or_seen(open_session: Open, kv: str, size: float) -> None:
    """What fp16 scales cannot hold is not finite, in its own sequence only; what they cannot resolve is nearly zero."""
    call = replace(random_call(5, 2, 3, 2, 1, 32, 4, rope=False, tuned=False), past_length=np.array([0, 4]))
    call.qkv[0, :, -32:] *= np.float32(size)
    y, *_ = run(open_session, quantized(call, kv))
    alone = run(open_session, quantized(call, kv).sequences(slice(1, 2)))[0]
    assert np.array_equal(y[1:], alone)
    if not size < 65504 * LARGEST[kv] / 4:
        assert not np.isfinite(y[0]).all()
    else:
        want = true_attention(call)[0][0]
        assert np.abs(y[0] - want).max() <= 0.5 * np.abs(want).max() + 1e-6


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (3, 1 + 2**-9), (2, 1 + 2**-10), (1.01, 1 + 2**-10)])
def test_scales_are_rounded_to_even(open_session: Open, steps: float, scale: float) -> None:
    """Of numbers in the middle between two of fp16, whose step at 1 is 2**-10."""
    call = random_call(7, 1, 1, 1, 1, 16, 0, rope=False, tuned=False)
    call.qkv[0, 0, -16:] = np.float32(127 * (1 + steps * 2**-11))
    _, _, value = run(open_session, quantized(call, "int8"))
    assert value[0, 0, 0, 16:].copy().view(np.float16) == np.float16(scale)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_rows_of_zero_bytes_are_zeros(kv: str) -> None:
    """What the runtime makes new and wiped caches of."""
    assert not values_of(np.zeros((3, 4, 64 * BITS[kv] // 8 + 2 * 64 // min(64, GROUPS[kv])), np.uint8), kv, 64).any()


# --- the same bits ---

CALL = random_call(1, 3, 70, 6, 2, 48, 300, rope=True, tuned=True)


@pytest.mark.parametrize("threads", [2, 5])
def test_bits_do_not_depend_on_threads(open_session: Open, threads: int) -> None:
    assert all(map(np.array_equal, run(open_session, CALL, threads), run(open_session, CALL)))


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 3), slice(2, 3)])
def test_bits_do_not_depend_on_the_batch(open_session: Open, chosen: slice) -> None:
    got = run(open_session, CALL.sequences(chosen))
    assert all(np.array_equal(part, whole[chosen]) for part, whole in zip(got, run(open_session, CALL), strict=True))


@pytest.mark.parametrize("pieces", [(0, 1, 2, 3, 70), (0, 69, 70), (0, 33, 70)])
def test_bits_do_not_depend_on_how_tokens_are_cut(open_session: Open, pieces: tuple[int, ...]) -> None:
    """Decode, a prompt at once and drafted tokens that are checked together: one arithmetic."""
    want, *_ = run(open_session, CALL)
    call, found = CALL, []
    for start, stop in pairwise(pieces):
        y, key, value = run(open_session, call.tokens(start, stop))
        call = replace(call, past_key=key, past_value=value)
        found.append(y)
    assert np.array_equal(np.concatenate(found, axis=1), want)


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512_vnni"])
def test_bits_do_not_depend_on_the_instruction_set(open_session: Open, forced: Any, instruction_set: str) -> None:
    want = run(open_session, CALL)
    with forced(instruction_set):
        assert all(map(np.array_equal, run(open_session, CALL), want))


def test_more_partials_than_are_kept_at_once(open_session: Open) -> None:
    """A prompt that is gone through in slabs."""
    call = random_call(2, 1, 700, 8, 1, 128, 2000, rope=False, tuned=False)
    want, *_ = run(open_session, call)
    for start in (0, 699):
        filled = replace(call, past_key=run(open_session, call)[1], past_value=run(open_session, call)[2])
        assert np.array_equal(run(open_session, filled.tokens(start, start + 1))[0], want[:, start : start + 1])


# --- the caches ---


@pytest.mark.parametrize("kv", ["float", "int8", "int4"])
def test_present_may_be_the_memory_of_past(open_session: Open, kv: str) -> None:
    """And may be filled to its last row."""
    exact = random_call(6, 2, 3, 4, 2, 64, 40, rope=True, tuned=True)
    exact = replace(exact, past_length=np.full(2, exact.past_key.shape[2] - 3))
    call = exact if kv == "float" else quantized(exact, kv)
    want = run(open_session, call)
    opened = session(open_session, call)
    binding = opened.io_binding()
    bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in call.feeds.items()}
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    y = np.empty_like(want[0])
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
    binding.bind_ortvalue_output("present_key", bound["past_key"])
    binding.bind_ortvalue_output("present_value", bound["past_value"])
    opened.run_with_iobinding(binding)
    assert all(map(np.array_equal, (y, call.past_key, call.past_value), want))


def test_rows_of_others_are_left_alone(open_session: Open) -> None:
    """What is stored in the new rows is exact, all else untouched: also what is not a number, which nobody reads."""
    call = replace(CALL, past_key=CALL.past_key.copy())
    for b, length in enumerate(call.past_length):
        call.past_key[b, :, length + 70 :] = np.nan
    y, key, _ = run(open_session, call)
    assert np.array_equal(y, run(open_session, CALL)[0])
    for b, length in enumerate(call.past_length):
        assert np.array_equal(key[b, :, :length], call.past_key[b, :, :length])
        assert np.isnan(key[b, :, length + 70 :]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["query", "past_key", "past_value"])
def test_what_is_not_a_number_stays_in_its_sequence(open_session: Open, part: str, value: float) -> None:
    small = replace(CALL, past_value=CALL.past_value / 100)  # so that no product overflows by itself
    call = replace(small, qkv=CALL.qkv.copy(), past_key=CALL.past_key.copy(), past_value=small.past_value.copy())
    assert call.past_length[1] > 0
    if part == "query":
        call.qkv[1, 0, 3] = value
    else:
        getattr(call, part)[1, :, 0, 3] = value
    got, want = run(open_session, call)[0], run(open_session, small)[0]
    assert np.array_equal(got[::2], want[::2])
    assert not np.isfinite(got[1, 0]).all()


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"past_length": np.array([0, -1, 0])}, "past_length is -1 for sequence 1"),
        ({"past_length": np.array([0, 0, 1 << 62])}, f"past_length is {1 << 62} for sequence 2, and 70 tokens are new"),
        ({"past_length": np.array([-(1 << 63), 0, 0])}, "for sequence 0"),
        ({"past_length": np.array([0, 0])}, r"past_length has shape \[2\], expected one for each of 3"),
        ({"qkv": CALL.qkv[:, :, :-1]}, r"expected \[B, S, 10 D\] and twice \[B, 2, C, D\]"),
        ({"qkv": CALL.qkv[0]}, r"qkv has shape \[70, 480\]"),
        ({"past_value": CALL.past_value[:, :, :-1]}, "D a multiple of 16 and at most 256"),
        ({"past_key": CALL.past_key[:2]}, r"expected \[B, S, 10 D\]"),
        ({"past_key": np.zeros((3, 3, 400, 48), np.float32)}, "6 heads on 3|expected"),
        ({"cos": CALL.cos[:, :-1]}, r"cos has shape \[3, 69, 24\], expected \[3, 70, 24\]"),  # type: ignore[index]
        ({"sin": None}, "cos and sin must come together"),
        ({"temperature": np.zeros((3, 1), np.float32)}, r"temperature has shape \[3, 1\], expected \[3, 70\]"),
        ({"heads": 5}, "5 heads on 2 key and value heads"),
        ({"heads": -2}, "heads on 2 key and value heads"),
        ({"epsilon": -1.0}, "qk_norm_epsilon is below zero"),
        ({"epsilon": float("nan")}, "qk_norm_epsilon is below zero"),
    ],
)
def test_what_does_not_fit_is_refused(open_session: Open, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        run(open_session, replace(CALL, **changes))


@pytest.mark.parametrize(("kv", "dim"), [("int8", 144), ("int4", 48), ("int8", 24), ("int4", 272)])
def test_heads_that_are_no_whole_groups_are_refused(open_session: Open, kv: str, dim: int) -> None:
    call = random_call(1, 1, 1, 2, 1, dim, 3, rope=False, tuned=False)
    cache = np.zeros((1, 1, 9, dim * BITS[kv] // 8 + 2 * -(-dim // GROUPS[kv])), np.uint8)
    with pytest.raises(Exception, match=f"in whole groups of {GROUPS[kv]}"):
        run(open_session, replace(call, kv=kv, past_key=cache, past_value=cache))


def test_a_quantized_cache_of_another_width_is_refused(open_session: Open) -> None:
    call = quantized(random_call(1, 1, 1, 2, 1, 64, 3, rope=False, tuned=False), "int8")
    narrow = replace(call, past_key=call.past_key[..., :-1], past_value=call.past_value[..., :-1])
    with pytest.raises(Exception, match=r"expected \[B, S, 4 D\] and twice \[B, 1, C, bytes of a row\]"):
        run(open_session, narrow)


@pytest.mark.parametrize("dim", [8, 24, 272])
def test_heads_of_other_widths_are_refused(open_session: Open, dim: int) -> None:
    with pytest.raises(Exception, match="D a multiple of 16 and at most 256"):
        run(open_session, random_call(1, 1, 1, 2, 1, dim, 3, rope=False, tuned=False))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (1, 0)])
def test_nothing_gives_nothing(open_session: Open, batch: int, tokens: int) -> None:
    call = random_call(1, batch, tokens, 2, 1, 16, 3, rope=False, tuned=False)
    assert run(open_session, call)[0].shape == (batch, tokens, 32)
