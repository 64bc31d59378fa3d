"""Prompts that begin alike: the same answers with the prefix cache and without, and how much of them it spared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.runtime import LLM, SamplingParams
from corral.runtime.engine import Engine
from corral.runtime.kv_cache import KvCache
from corral.runtime.prefix_cache import BLOCK_TOKENS, PrefixCache
from corral.runtime.request import Request
from corral.runtime.speculative.prompt_lookup import PromptLookup
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.kv_layout import kv_layouts
from corral.spec.model_config import ModelConfig

CHUNK = 8
WORDS = np.random.default_rng(0).integers(0, 256, (2, 40)).tolist()  # two texts that prompts begin with
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(config: ModelConfig, session: Any, embed: Any) -> MakeEngine:
    """Blocks of two tokens, so that prefixes end amid chunks, too."""

    def make(max_bytes: int = 1 << 30, **options: Any) -> Engine:
        layouts = kv_layouts(config)
        engine = Engine(session, embed, layouts, vocab_size=config.vocab_size, max_context=512, **options)
        assert isinstance(engine._cache, KvCache)
        engine._prefixes = PrefixCache(engine._cache, layouts, max_bytes, block_tokens=2) if max_bytes else None
        return engine

    return make


def ask(engine: Engine, *prompts: list[int], params: SamplingParams = GREEDY) -> list[Request]:
    requests = [
        Request(tuple(prompt), params, max_tokens=params.max_tokens, eos_token_ids=(), decoder=None)
        for prompt in prompts
    ]
    for request in requests:
        engine.add(request)
    while not all(request.done for request in requests):
        engine.step()
    return requests


def outputs(requests: list[Request]) -> list[list[int]]:
    assert all(request.error is None for request in requests)
    return [request.output_ids for request in requests]


PROMPTS = st.builds(
    lambda text, shared, own: WORDS[text][:shared] + own,
    text=st.integers(0, 1),
    shared=st.sampled_from([0, 1, 2, 6, 7, 8, 9, 10, 15, 16, 17, 22, 24, 33]),
    own=st.lists(st.integers(0, 3), min_size=1, max_size=10),
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(PROMPTS, min_size=2, max_size=7), kilobytes=st.sampled_from([4, 30, 1000]), together=st.booleans()
)
def test_answers_are_the_same_with_the_cache_and_without(
    make_engine: MakeEngine, prompts: list[list[int]], kilobytes: int, together: bool
) -> None:
    plain = [outputs(ask(make_engine(max_bytes=0), prompt))[0] for prompt in prompts]
    engine = make_engine(max_bytes=kilobytes * 1000, max_batch=3, step_tokens=6)
    if together:
        assert outputs(ask(engine, *prompts)) == plain
    else:
        assert [outputs(ask(engine, prompt))[0] for prompt in prompts] == plain
    assert engine._prefixes is not None
    assert engine._prefixes.bytes == sum(block.bytes for block in engine._prefixes._blocks.values())
    assert engine._prefixes.bytes <= kilobytes * 1000


@pytest.mark.parametrize(
    ("shared", "cached"),
    [
        (21, 20),  # the prompt itself: blocks of 2, and its last token is left to compute
        (19, 18),
        (16, 16),
        (17, 16),
        (15, 8),  # of the chunk from 8 on, chunked layers' rows were written over: only its boundary is left
        (8, 8),
        (7, 0),
    ],
)
def test_a_prefix_ends_in_the_last_chunk_or_at_a_boundary(make_engine: MakeEngine, shared: int, cached: int) -> None:
    engine = make_engine()
    ask(engine, WORDS[0][:21], params=dataclasses.replace(GREEDY, max_tokens=1))
    [request] = ask(engine, WORDS[0][:shared] + [1] * (21 - shared))
    assert request.cached_tokens == cached


def test_what_was_written_is_known_to_the_next_turn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = WORDS[0][:11]
    [request] = ask(engine, first)
    turn = [*first, *request.output_ids, 7, 8]
    [answer] = ask(engine, turn)
    assert answer.cached_tokens == 14  # of 11 + 5 tokens the last one was never read
    assert outputs([answer]) == outputs(ask(make_engine(max_bytes=0), turn))


def test_it_works_with_guessed_tokens(make_engine: MakeEngine) -> None:
    prompts = [[*([1, 2, 3, 4, 5] * 3), n % 2] for n in range(4)]
    engine = make_engine(proposer=PromptLookup(), num_proposed=4)
    params = dataclasses.replace(GREEDY, max_tokens=20)
    plain = [outputs(ask(make_engine(max_bytes=0), prompt, params=params))[0] for prompt in prompts]
    assert [outputs(ask(engine, prompt, params=params))[0] for prompt in prompts] == plain


def test_rows_that_may_hold_nan_are_not_kept(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    embed = engine._embed
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_embed", lambda ids: embed(ids) * np.nan)
        [poisoned] = ask(engine, WORDS[0][:21])
    assert "not finite" in str(poisoned.error)
    [request] = ask(engine, WORDS[0][:21])
    assert request.cached_tokens == 0
    assert outputs([request]) == outputs(ask(make_engine(max_bytes=0), WORDS[0][:21]))


def filled(config: ModelConfig, max_bytes: int, dtype: str = "float32") -> PrefixCache:
    layouts = [dataclasses.replace(layout, dtype=dtype) for layout in kv_layouts(config)]
    cache = KvCache(layouts, 512)
    cache.reserve(1, 40)
    for array in (*cache.slot(0).keys, *cache.slot(0).values):
        array[...] = np.random.default_rng(array.size).integers(-99, 99, array.shape)
    return PrefixCache(cache, layouts, max_bytes, block_tokens=2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_come_back_bit_for_bit_whatever_they_hold(config: ModelConfig, dtype: str) -> None:
    prefixes = filled(config, 1 << 20, dtype)
    cache = prefixes._cache
    before = [array.copy() for array in (*cache.slot(0).keys, *cache.slot(0).values)]
    prefixes.store(WORDS[0][:13], 0)
    cache.wipe(0)
    assert prefixes.restore(WORDS[0][:20], 0) == 12
    for layer, (array, old) in enumerate(zip((*cache.slot(0).keys, *cache.slot(0).values), before, strict=True)):
        rows = slice(0, 12) if config.layers[layer % 3].kv_class == "global" else slice(0, 4)
        np.testing.assert_array_equal(array[:, :, rows], old[:, :, rows])


def test_what_was_not_used_for_longest_makes_room_ends_first(config: ModelConfig) -> None:
    one = filled(config, 1 << 20)
    one.store(WORDS[0][:8], 0)
    prefixes = filled(config, 2 * one.bytes)
    prefixes.store(WORDS[0][:8], 0)
    prefixes.store(WORDS[1][:8], 0)
    assert len(prefixes.prefix(WORDS[0])) == 4  # used again
    prefixes.store([5] * 4, 0)
    assert [len(prefixes.prefix(text)) for text in (WORDS[0], WORDS[1], [5] * 4)] == [4, 2, 2]
    assert len(prefixes._blocks) == 8 and prefixes.bytes <= prefixes.max_bytes
    prefixes.store(WORDS[1][8:40], 0)  # more than there is room for: its beginning
    assert prefixes.bytes <= prefixes.max_bytes
    assert not prefixes.prefix(WORDS[0])


MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(make_bundle: Any, model: Any, session: Any) -> MakeLLM:
    table = model.embed_tokens.weight.detach().numpy()
    made: dict[str, Path] = {}

    def make(name: str = "bundle", *, table: np.ndarray = table, **options: Any) -> LLM:
        made[name] = made.get(name) or make_bundle(name, table=table)
        return LLM(made[name], session=session, **{"prefix_cache_gb": 0.1, **options})

    return make


PROMPT = WORDS[0][:37]


@pytest.fixture
def saved(make_llm: MakeLLM, tmp_path: Path) -> Path:
    llm = make_llm()
    [completion] = llm.generate([PROMPT], GREEDY)
    assert completion.timings.cached_tokens == 0
    assert llm.save_prefix(PROMPT, tmp_path / "prefix") == 32
    assert [path.name for path in tmp_path.iterdir() if "prefix" in path.name] == ["prefix"]
    return tmp_path / "prefix"


def test_a_file_spares_another_process_the_prompt(make_llm: MakeLLM, saved: Path) -> None:
    llm = make_llm()
    assert llm.load_prefix(saved) == 32
    for tail in ([1, 2, 3], PROMPT[32:]):
        [completion] = llm.generate([PROMPT[:32] + tail], GREEDY)
        assert completion.timings.cached_tokens == 32
        assert completion.token_ids == make_llm(prefix_cache_gb=0).generate([PROMPT[:32] + tail], GREEDY)[0].token_ids


def change_header(**fields: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        line, rest = data.split(b"\n", 1)
        return json.dumps({**json.loads(line), **fields}).encode() + b"\n" + rest

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-40], "incomplete"),
        (lambda data: data[:300], "incomplete|no file of a prefix cache"),
        (lambda data: data + b"x", "incomplete"),
        (lambda data: b"", "no file of a prefix cache"),
        (lambda data: b"[" * 100_000, "no file of a prefix cache"),
        (lambda data: b"[1]\n" + data, "no file of a prefix cache"),
        (lambda data: np.random.default_rng(0).bytes(5000), "no file of a prefix cache"),
        (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "damaged"),
        (change_header(tokens=1 << 62), "incomplete"),
        (change_header(tokens=-8), "another version"),
        (change_header(tokens=True), "another version"),
        (change_header(tokens=33), "another version"),
        (change_header(tokens="many"), "another version"),
        (change_header(rows={}), "another version"),
        (change_header(corral_prefix=2), "another version"),
        (change_header(bundle="0" * 64), "of another bundle"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    make_llm: MakeLLM, saved: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    saved.write_bytes(change(saved.read_bytes()))
    llm = make_llm()
    with pytest.raises(InputError, match=says):
        llm.load_prefix(saved)
    assert llm.generate([PROMPT], GREEDY)[0].timings.cached_tokens == 0


def test_rows_without_numbers_are_refused(make_llm: MakeLLM, tmp_path: Path) -> None:
    llm = make_llm()
    llm.generate([PROMPT], GREEDY)
    known: Any = llm._engine._prefixes
    list(known._blocks.values())[-1].rows["global"][0][0, 0] = np.nan  # the first block: the end goes first
    llm.save_prefix(PROMPT, tmp_path / "prefix")
    with pytest.raises(InputError, match="not finite"):
        make_llm().load_prefix(tmp_path / "prefix")


def test_another_bundle_and_too_small_a_cache_are_refused(make_llm: MakeLLM, saved: Path, model: Any) -> None:
    other = make_llm("other", table=model.embed_tokens.weight.detach().numpy() * 2)
    with pytest.raises(InputError, match="of another bundle"):
        other.load_prefix(saved)
    with pytest.raises(InputError, match="larger prefix_cache_gb"):
        make_llm(prefix_cache_gb=1e-6).load_prefix(saved)
    with pytest.raises(InputError, match="cannot be read"):
        make_llm().load_prefix(saved.with_name("nowhere"))


def test_what_cannot_be_saved_says_why(make_llm: MakeLLM, tmp_path: Path) -> None:
    llm = make_llm()
    with pytest.raises(InputError, match="nothing of this prompt"):
        llm.save_prefix(PROMPT, tmp_path / "prefix")
    llm.generate([PROMPT], GREEDY)
    assert llm.save_prefix(PROMPT[:2], tmp_path / "prefix") == 0  # shorter than a block
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        llm.save_prefix(PROMPT, tmp_path / "nowhere" / "prefix")
    with pytest.raises(InputError, match="prefix_cache_gb is 0"):
        make_llm(prefix_cache_gb=0).save_prefix(PROMPT, tmp_path / "prefix")
    with pytest.raises(InputError, match="prefix_cache_gb is -1"):
        make_llm(prefix_cache_gb=-1)
    assert not (tmp_path / "prefix").exists()


def test_blocks_fit_into_the_chunks_of_published_models() -> None:
    assert 8192 % BLOCK_TOKENS == 0
