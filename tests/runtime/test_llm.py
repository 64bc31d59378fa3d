"""LLM from the outside, over the PyTorch reference: prompts, streams, chats, scores and refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from corral.runtime import LLM, SamplingParams
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.tokenizer import Tokenizer
from corral.spec.bundle import open_bundle
from corral.spec.errors import EnvironmentProblem, InputError

EOS = 257
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(make_bundle: Any, model: Any, session: Any) -> MakeLLM:
    def make(*, tokenizer: bool = True, **options: Any) -> LLM:
        table = model.embed_tokens.weight.detach().numpy()
        return LLM(make_bundle(table=table, tokenizer=tokenizer), session=session, **options)

    return make


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()


def test_scores_are_the_references(llm: LLM, model: Any) -> None:
    import torch

    ids = np.random.default_rng(0).integers(0, 264, 30)
    with torch.no_grad():
        expected = model.logits(torch.from_numpy(ids)[None])[0].numpy()
    for form in (ids, ids.tolist(), tuple(ids.tolist()), ids.astype(np.int32)):
        np.testing.assert_allclose(llm.score(form), expected, rtol=0, atol=2e-4)
    assert llm.score(ids).dtype == np.float32
    assert sum(len(piece) for piece in llm.score_pieces(ids)) == 30


def tokenizer_of(llm: LLM) -> Tokenizer:
    assert llm.tokenizer is not None
    return llm.tokenizer


def test_one_prompt_or_many_texts_or_ids_give_the_same(llm: LLM) -> None:
    ids = tokenizer_of(llm).encode("hello")
    forms: list[Any] = ["hello", ["hello"], ids, [ids], np.array(ids), [np.array(ids)], ("hello",)]
    tokens = {llm.generate(form, GREEDY)[0].token_ids for form in forms}
    assert len(tokens) == 1
    mixed: list[Any] = ["hello", ids]
    first, second = llm.generate(mixed, [GREEDY, GREEDY])
    assert {first.token_ids, second.token_ids} == tokens
    assert first.prompt_token_ids == tuple(ids)
    assert llm.generate([]) == []


def test_a_completion_says_all_of_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    (completion,) = llm.generate("hello", params)
    assert completion.text == tokenizer_of(llm).decode(completion.token_ids)
    assert completion.finish_reason == "length"
    assert completion.logprobs is not None
    assert [t.token_id for t in completion.logprobs] == list(completion.token_ids)
    assert all(t.top[0] == (t.token_id, t.logprob) and len(t.top) == 2 for t in completion.logprobs)
    assert completion.timings.num_tokens == 5
    assert 0 < completion.timings.first_token <= completion.timings.total


def test_a_stream_joins_to_the_completion(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True, logprobs=0)
    (completion,) = llm.generate("hello", params)
    pieces = list(llm.stream("hello", params))
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(i for piece in pieces for i in piece.token_ids) == completion.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert tuple(t for piece in pieces for t in piece.logprobs or ()) == completion.logprobs


def with_end_token_at(llm: LLM, count: int) -> None:
    """Make the model's end token the likeliest after `count` tokens of answer."""
    session, run, calls = llm._engine._session, llm._engine._session.run, itertools.count()

    def ending(step: Any) -> Any:
        logits = run(step).copy()
        if next(calls) == count:
            logits[..., EOS] = 1e4
        return logits

    session.run = ending  # type: ignore[method-assign]


def test_the_end_token_ends_it_and_is_no_text(llm: LLM) -> None:
    with_end_token_at(llm, 3)
    (completion,) = llm.generate("hi", SamplingParams(temperature=0))
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == EOS
    assert len(completion.token_ids) == 4
    assert completion.text == tokenizer_of(llm).decode(completion.token_ids[:-1])


def test_the_end_token_may_be_ignored(llm: LLM) -> None:
    with_end_token_at(llm, 3)
    (completion,) = llm.generate("hi", SamplingParams(temperature=0, ignore_eos=True, max_tokens=6))
    assert completion.finish_reason == "length"
    assert completion.token_ids[3] == EOS


def test_min_tokens_puts_the_end_off(llm: LLM) -> None:
    with_end_token_at(llm, 3)
    (completion,) = llm.generate("hi", SamplingParams(temperature=0, min_tokens=5, max_tokens=6))
    assert EOS not in completion.token_ids[:5]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    stop = whole.text[5:8]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop,))
    (completion,) = llm.generate("hello", params)
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert "".join(piece.text for piece in llm.stream("hello", params)) == completion.text


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (completion,) = llm.chat(messages, GREEDY)
    assert completion.prompt_token_ids == tuple(tokenizer_of(llm).apply_chat_template(messages))
    assert [c.token_ids for c in llm.chat([messages, messages], GREEDY)] == [completion.token_ids] * 2
    assert "".join(piece.text for piece in llm.chat_stream(messages, GREEDY)) == completion.text


def test_generation_stops_where_the_context_is_full(make_llm: MakeLLM) -> None:
    llm = make_llm(max_context=10)
    (completion,) = llm.generate([[1, 2, 3, 4]], GREEDY)
    assert len(completion.token_ids) == 6
    assert completion.finish_reason == "length"
    assert len(llm.score(range(10))) == 10


def test_two_streams_and_a_batch_may_run_at_once(llm: LLM) -> None:
    expected = [c.token_ids for c in llm.generate([[1, 2], [3]], GREEDY)]
    first, second = llm.stream([1, 2], GREEDY), llm.stream([3], GREEDY)
    tokens: list[list[int]] = [[], []]
    tokens[0] += next(first).token_ids
    tokens[1] += next(second).token_ids
    assert [c.token_ids for c in llm.generate([[1, 2], [3]], GREEDY)] == expected
    for stream, ids in zip((first, second), tokens, strict=True):
        for piece in stream:
            ids += piece.token_ids
    assert [tuple(ids) for ids in tokens] == expected


def test_threads_share_one_llm(llm: LLM) -> None:
    prompts = [[n, n + 1] for n in range(6)]
    expected = [c.token_ids for c in llm.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(6) as pool:
        streamed = pool.map(lambda p: tuple(i for piece in llm.stream(p, GREEDY) for i in piece.token_ids), prompts)
        assert list(streamed) == expected
    assert llm._engine._scheduler.idle


def test_a_closed_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm._engine._scheduler.idle
    assert llm._engine._cache.bytes == 0


def test_without_a_tokenizer_ids_work_and_text_says_why_not(make_llm: MakeLLM) -> None:
    llm = make_llm(tokenizer=False)
    (completion,) = llm.generate([[1, 2, 3]], GREEDY)
    assert completion.text == ""
    assert [piece.token_ids for piece in llm.stream([1, 2, 3], GREEDY)] == [(i,) for i in completion.token_ids]
    assert llm.score([1, 2, 3]).shape == (3, 264)
    for call in (lambda: llm.generate("hi"), lambda: llm.chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(InputError, match="no tokenizer"):
            call()
    with pytest.raises(InputError, match="stop strings need text"):
        llm.generate([[1]], SamplingParams(stop=("a",)))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([[]], "empty"),
        ([[264]], "token id 264 is outside the vocabulary; expected 0 to 263"),
        ([[-1]], "token id -1"),
        ([[0.5]], "expected integers"),
        ([[[1]]], "nested"),
        ([[1, [2]]], "nested"),
        ([[True]], "expected integers"),
        (3, "expected a text"),
        ([None], "expected a text"),
        ([[1] * 100], "leaves no room"),
        ([[1] * 101], "more than max_context 100"),
    ],
)
def test_impossible_prompts_are_refused(make_llm: MakeLLM, prompt: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_llm(max_context=100).generate(prompt, GREEDY)


def test_impossible_params_are_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match="2 params for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])
    with pytest.raises(InputError, match="expected SamplingParams"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_context": 0}, {"max_context": 9999}, {"max_batch": 0}])
def test_impossible_options_are_refused(make_llm: MakeLLM, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        make_llm(**options)


def test_an_unfinished_stage_is_refused(make_bundle: Any, session: Any) -> None:
    with pytest.raises(InputError, match='stage "exported"'):
        LLM(make_bundle(stage="exported"), session=session)


def test_an_old_onnxruntime_is_the_environments_problem(make_bundle: Any) -> None:
    with pytest.raises(EnvironmentProblem, match=r"this bundle needs 99\.0 or newer"):
        LLM(make_bundle(requires={"onnxruntime": "99.0"}))
    with pytest.raises(EnvironmentProblem, match="nonesuch is not installed"):
        LLM(make_bundle("other", requires={"nonesuch": "1"}))


def test_a_graph_that_is_none_is_refused_by_name(make_bundle: Any) -> None:
    with pytest.raises(InputError, match=r"cannot open .*decoder\.onnx"):
        LLM(make_bundle())


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_embeddings_of_every_storage_type(make_bundle: Any, dtype: str, atol: float) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (264, 32)).astype(np.float32)
    stored = (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rows.astype(dtype)
    table = EmbeddingTable(open_bundle(make_bundle(table=stored, table_dtype=dtype)))
    np.testing.assert_allclose(table([5, 0, 263, 5]), rows[[5, 0, 263, 5]], rtol=0, atol=atol)
    assert table([1]).dtype == np.float32


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    program = "import sys, corral.runtime; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in ("onnxruntime", "numpy", "tokenizers", "jinja2", "torch", "onnx"))
