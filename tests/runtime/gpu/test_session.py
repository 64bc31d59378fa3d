"""The TensorRT session against the ONNX Runtime session over the same graphs. No engine runs: see conftest.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.runtime import LLM, SamplingParams
from corral.runtime.completion import Completion
from corral.runtime.gpu.device_kv_cache import DeviceKvCache
from corral.runtime.gpu.tensorrt_session import Limits, TensorRTSession, cut
from corral.runtime.kv_cache import KvCache
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import CacheView, Step
from corral.spec.bundle import Bundle

EngineBundle = Callable[..., Bundle]
Install = Callable[..., Any]

# Of the logits' scale: the same graph in the same library, but cut otherwise, and float16 has 11 bits.
TOLERANCE = 2e-3


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def opened(bundle: Bundle, device: Any) -> LLM:
    return LLM(bundle, session=TensorRTSession(bundle, open_device=lambda: device))


def reference(bundle: Bundle) -> LLM:
    return LLM(bundle, session=OnnxRuntimeSession(bundle, threads=1))


def logprobs(completion: Completion) -> list[float]:
    return [token.logprob for token in completion.logprobs or ()]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("scout", {}),
        ("scout", {"weights": "int4"}),
        ("scout", {"rows": 5}),
        ("maverick", {"stages": 3}),
    ],
)
def test_scores_equal_those_of_onnx_runtime_across_chunks(
    engine_bundle: EngineBundle, install: Install, form: str, options: Any
) -> None:
    bundle, device = engine_bundle(form, **options), install()
    text = ids(3 * 16 + 5)
    assert_close(opened(bundle, device).score(text), reference(bundle).score(text))
    if "rows" not in options:  # a profile of one row scores a token at a time
        assert set(device.log) == {"run decode", "record", "launch"}


@pytest.mark.parametrize(("tokens", "count"), [(6, 1), (6, 7), (6, 16), (6, 39), (16, 15), (16, 17), (16, 39)])
def test_a_prompt_is_read_in_pieces_of_the_profile_and_continued(
    engine_bundle: EngineBundle, install: Install, tokens: int, count: int
) -> None:
    bundle, device = engine_bundle("scout", tokens=tokens), install()
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=3)
    got, want = (llm.generate([ids(count)], params)[0] for llm in (opened(bundle, device), reference(bundle)))
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(want), atol=5e-3)
    whole, rest = divmod(count, 16)  # the engine cuts at chunks of 16 tokens, the session at the profile's
    pieces = [tokens] * (16 // tokens) + [16 % tokens] * (16 % tokens > 0)
    lengths = pieces * whole + [tokens] * (rest // tokens) + [rest % tokens] * (rest % tokens > 0)
    assert device.log.count("run prefill") == sum(length > 1 for length in lengths)
    assert device.log.count("record") == 1


def test_sequences_that_decode_together_equal_each_alone(engine_bundle: EngineBundle, install: Install) -> None:
    """Five prompts in three slots: they end at different times, so that slots move and the batch shrinks and grows."""
    bundle, device = engine_bundle("scout"), install()
    prompts = [ids(count, seed=count) for count in (3, 17, 31, 8, 20)]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (25, 4, 11, 18, 7)]
    together = opened(bundle, device).generate(prompts, params)
    alone = [reference(bundle).generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert device.log.count("launch") > device.log.count("record") > 1


def test_a_step_of_more_rows_than_a_profile_takes_is_cut(engine_bundle: EngineBundle, install: Install) -> None:
    bundle, device = engine_bundle("scout"), install()
    session, other = TensorRTSession(bundle, open_device=lambda: device), OnnxRuntimeSession(bundle, threads=1)
    rng = np.random.default_rng(0)
    for tokens in (1, 5):
        logits = []
        for one in (session, other):
            caches = one.new_caches(bundle.manifest.kv, 64)
            caches.reserve(7, 16)
            rng = np.random.default_rng(tokens)
            step = Step(
                embeddings_BSH=rng.standard_normal((7, tokens, 64)).astype(np.float32),
                positions_BS=np.tile(np.arange(tokens), (7, 1)),
                logit_rows_BR=rng.integers(0, tokens, (7, 3)),
                past_length_B=caches.past_lengths([0] * 7),
                caches=caches.prefix(7),
            )
            logits.append(one.run(step))
        assert_close(*logits)


def test_memory_of_finished_work_is_given_back_and_recordings_with_it(
    engine_bundle: EngineBundle, install: Install
) -> None:
    bundle, device = engine_bundle("scout"), install()
    llm = opened(bundle, device)
    session: Any = llm._engine._session
    before = len(device.memory)
    llm.score(ids(20))
    gc.collect()
    assert len(device.memory) == before
    assert not session._recorded
    llm.generate([ids(4)], SamplingParams(max_tokens=4, ignore_eos=True))
    kept, recorded = len(device.memory), device.log.count("record")
    llm.generate([ids(4)], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(device.memory) == kept > before
    assert device.log.count("record") == recorded  # the caches lie where they lay
    del llm, session
    gc.collect()
    assert not device.memory


def test_context_and_batch_are_those_the_engines_were_built_for(engine_bundle: EngineBundle, install: Install) -> None:
    bundle, device = engine_bundle("scout"), install()
    llm = opened(bundle, device)
    assert llm.max_context == 64
    llm.generate([ids(2, seed=i) for i in range(5)], SamplingParams(max_tokens=3, ignore_eos=True))
    assert llm._engine._cache.num_slots <= 3
    with pytest.raises(Exception, match=r"expected 1 to 64 tokens, which its engines were built for"):
        LLM(bundle, max_context=65)


@given(
    tokens=st.integers(1, 40),
    profiles=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=2),
    data=st.data(),
)
def test_pieces_are_all_tokens_in_order_and_all_wanted_rows(
    tokens: int, profiles: list[tuple[int, int]], data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=5))
    limits = [Limits(batch=2, tokens=1, rows=1), *(Limits(batch=1, tokens=t, rows=r) for t, r in profiles)]
    step = Step(
        embeddings_BSH=np.zeros((batch, tokens, 2), np.float32),
        positions_BS=np.zeros((batch, tokens), np.int64),
        logit_rows_BR=np.array([rows] * batch),
        past_length_B={},
        caches=CacheView(keys=(), values=()),
    )
    pieces = list(cut(step, limits))
    seen = [(b, s) for p in pieces for b in range(p.first, p.end) for s in range(p.start, p.stop)]
    assert sorted(seen) == [(b, s) for b in range(batch) for s in range(tokens)]
    for b in range(batch):
        own = [piece for piece in pieces if piece.first <= b < piece.end]
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own[:-1])]
        assert set(rows) <= {piece.start + row for piece in own for row in piece.rows}
    for piece in pieces:
        count = piece.stop - piece.start
        taken = [one for one in limits if count <= one.tokens and len(piece.rows) <= one.rows]
        assert any(piece.end - piece.first <= one.batch for one in taken)
        assert all(0 <= row < count for row in piece.rows)


def test_device_caches_move_and_wipe_as_those_in_memory_do(engine_bundle: EngineBundle, install: Install) -> None:
    bundle, device = engine_bundle("scout"), install()
    layouts = bundle.manifest.kv
    here, there = KvCache(layouts, 64), DeviceKvCache(device, layouts, 3)
    rng = np.random.default_rng(0)

    def arrays(slot: int) -> list[np.ndarray]:
        view, own = there.slot(slot), here.slot(slot)
        pairs = zip((*view.keys, *view.values), (*own.keys, *own.values), strict=True)
        return [device.at(address, array.nbytes).view(array.dtype).reshape(array.shape) for address, array in pairs]

    for caches in (here, there):
        caches.reserve(2, 20)
    for slot in (0, 1):
        for array, bytes_there in zip((*here.slot(slot).keys, *here.slot(slot).values), arrays(slot), strict=True):
            array[:] = rng.standard_normal(array.shape)
            bytes_there[:] = array
    for caches in (here, there):
        caches.reserve(3, 20)  # another slot: everything moves
        caches.move(1, 2, 20)
        caches.wipe(0)
        assert caches.num_slots == (4 if caches is here else 3)
    for slot, filled in ((0, {16: 16, 64: 64}), (1, {16: 16, 64: 64}), (2, {16: 4, 64: 20})):
        for array, got in zip((*here.slot(slot).keys, *here.slot(slot).values), arrays(slot), strict=True):
            rows = filled[array.shape[2]]
            np.testing.assert_array_equal(got[:, :, :rows], array[:, :, :rows])
