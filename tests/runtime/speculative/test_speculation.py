"""Tokens guessed ahead change how fast an answer comes and nothing else: greedy, with seeds, and in distribution."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from corral.runtime import LLM
from corral.runtime.engine import Engine
from corral.runtime.kv_cache import KvCache
from corral.runtime.request import Request
from corral.runtime.sampler import Candidates
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.session import Step
from corral.runtime.speculative.draft_model import DraftModel
from corral.runtime.speculative.prompt_lookup import PromptLookup
from corral.runtime.speculative.proposal import Proposal, Proposer
from corral.runtime.speculative.sampling import accept_or_replace
from corral.spec.errors import InputError
from corral.spec.kv_layout import kv_layouts
from corral.spec.model_config import ModelConfig

CHUNK = 8
MakeProposer = Callable[[], Proposer]


class Counting:
    """A proposer that counts what it proposes, and the tokens of the steps that come of it."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer, self.proposed = proposer, 0

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Proposal]:
        found = self.proposer.propose(requests, most)
        assert all(len(proposal.tokens) <= count for proposal, count in zip(found, most, strict=True))
        self.proposed += sum(len(proposal.tokens) for proposal in found)
        return found

    def forget(self, request: Request) -> None:
        self.proposer.forget(request)


@pytest.fixture(params=["lookup", "near draft", "far draft"])
def make_proposer(request: pytest.FixtureRequest, model: Any, session: Any, config: ModelConfig) -> MakeProposer:
    """Prompt lookup; a draft that is often right; one that hardly ever is."""
    if request.param == "lookup":
        return PromptLookup
    import torch

    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.01 if request.param == "near draft" else 0.3)
    table = draft.embed_tokens.weight.detach().numpy()
    return lambda: DraftModel(
        type(session)(draft),
        lambda ids: table[np.asarray(ids)],
        kv_layouts(config),
        max_context=512,
        step_tokens=5,  # so that it reads prompts in several steps
    )


@pytest.fixture
def engine(config: ModelConfig, session: Any, embed: Any) -> Callable[..., Engine]:
    run = session.run

    def within_a_chunk(step: Step) -> np.ndarray:
        chunks = step.positions_BS // CHUNK
        assert (chunks == chunks[:, :1]).all()
        return run(step)

    session.run = within_a_chunk
    return lambda proposer=None, **options: Engine(
        session,
        embed,
        kv_layouts(config),
        vocab_size=config.vocab_size,
        proposer=proposer,
        num_proposed=5,
        **{"max_context": 512, **options},
    )


def finish(engine: Engine, *requests: Request) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    while not all(request.done for request in requests):
        engine.step()
    assert engine.idle
    return [request.output_ids for request in requests]


def request(length: int, **wishes: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 30, "temperature": 0, "ignore_eos": True, **wishes})
    prompt = np.random.default_rng(length).integers(0, 6, length).tolist()  # few letters, so that some repeats
    return Request(tuple(prompt), params, max_tokens=params.max_tokens, eos_token_ids=(5,), decoder=None)


@pytest.mark.parametrize("length", [1, 6, 7, 8, 9, 15, 16, 23])
def test_greedy_text_is_that_of_plain_decoding(
    engine: Callable[..., Engine], make_proposer: MakeProposer, length: int
) -> None:
    assert finish(engine(make_proposer()), request(length)) == finish(engine(), request(length))


def test_each_row_of_a_batch_has_its_own_proposals(engine: Callable[..., Engine], make_proposer: MakeProposer) -> None:
    lengths = (3, 8, 14, 21)
    proposer = Counting(make_proposer())
    together = finish(engine(proposer, max_batch=3, step_tokens=16), *map(request, lengths))
    assert together == [finish(engine(), request(length))[0] for length in lengths]
    assert proposer.proposed


def test_where_wide_batches_cannot_be_only_a_single_sequence_is_sped_up(
    engine: Callable[..., Engine], session: Any
) -> None:
    found = finish(engine(PromptLookup(), wide_batches=False), request(9), request(4, max_tokens=5))
    assert not [shape for shape in session.shapes if shape[0] > 1 and shape[1] > 1]
    assert [shape for shape in session.shapes[-8:] if shape[1] > 1]
    assert found == [finish(engine(), request(9))[0], finish(engine(), request(4, max_tokens=5))[0]]


@pytest.mark.parametrize(
    "wishes",
    [
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"ignore_eos": False, "min_tokens": 4},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"logprobs": 2},
    ],
)
def test_every_wish_is_granted_as_without(
    engine: Callable[..., Engine], make_proposer: MakeProposer, wishes: dict[str, Any]
) -> None:
    (with_it, plain) = request(11, **wishes), request(11, **wishes)
    finish(engine(make_proposer()), with_it)
    finish(engine(), plain)
    one, other = with_it.completion(), plain.completion()
    assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
    for ours, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_the_context_may_end_amid_a_proposal(engine: Callable[..., Engine], make_proposer: MakeProposer) -> None:
    wishes = request(9, max_tokens=28)
    assert finish(engine(make_proposer(), max_context=37), wishes) == finish(engine(), request(9, max_tokens=28))


@pytest.mark.parametrize("length", [1, 5, 6, 7, 8, 9, 13, 16])
def test_a_draft_goes_back_after_a_rejection(
    engine: Callable[..., Engine], model: Any, session: Any, embed: Any, config: ModelConfig, length: int
) -> None:
    """Whatever was rejected, what it proposes next is what the same model would write."""
    draft = DraftModel(type(session)(model), embed, kv_layouts(config), max_context=30, step_tokens=64)
    one = request(length)
    for other in (3, 4, 5):
        [proposal] = draft.propose([one], [5])
        ids = tuple(one.tokens_from(0))
        written = request(1, max_tokens=5)
        written.prompt_ids = ids
        assert proposal.tokens == tuple(finish(engine(), written)[0][: len(proposal.tokens)])
        assert proposal.tokens and proposal.drawn_from == ()
        one.output_ids += [*proposal.tokens[: other - 3], other]
    one.output_ids += [1] * (30 - one.num_tokens)
    assert len(draft.propose([one], [5])[0].tokens) == 1
    one.output_ids.append(1)
    assert draft.propose([one], [5]) == [Proposal()]


def test_a_cancelled_request_leaves_nothing_with_its_proposer(
    engine: Callable[..., Engine], make_proposer: MakeProposer
) -> None:
    proposer: Any = make_proposer()
    running = engine(proposer)
    running.add(gone := request(9))
    for _ in range(6):
        running.step()
    running.cancel(gone)
    assert not (proposer._histories if isinstance(proposer, PromptLookup) else proposer._seats)
    assert finish(running, request(12)) == finish(engine(), request(12))


def test_a_drawn_token_becomes_one_of_the_target_exactly() -> None:
    """Over all drafted tokens, and uniform numbers on a grid that every threshold lies on the lines of."""

    class Given:
        def __init__(self, *uniform: float) -> None:
            self.random = iter(uniform).__next__

    steps = 10  # a fifth of the drafted 0s is accepted; of what is rejected a fifth becomes 1, the rest 3
    grid = [(n + 0.5) / steps for n in range(steps)]
    shares = (Fraction(5, 8), Fraction(2, 8), Fraction(1, 8))
    draft = Candidates(np.arange(3), np.array([10.0, 4.0, 2.0]))
    target = Candidates(np.array([0, 1, 3]), np.array([1.0, 3.0, 4.0]))  # lacks token 2, has one that the draft lacks
    found: defaultdict[int, Fraction] = defaultdict(Fraction)
    for token, share in enumerate(shares):
        for uniforms in itertools.product(grid, grid):
            generator: Any = Given(*uniforms)
            found[accept_or_replace(token, draft, target, generator)] += share * Fraction(1, steps**2)
    assert found == {0: Fraction(1, 8), 1: Fraction(3, 8), 3: Fraction(4, 8)}


class Chain:
    """A Session without a model: the logits after a token are a row of a table."""

    def __init__(self, logits_VV: np.ndarray) -> None:
        self.logits_VV = logits_VV

    def run(self, step: Step) -> np.ndarray:
        tokens = step.embeddings_BSH.argmax(-1)
        return self.logits_VV[np.take_along_axis(tokens, step.logit_rows_BR, 1)]

    def new_caches(self, layouts: Any, max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def release(self) -> None:
        pass


@pytest.fixture
def chain(config: ModelConfig) -> Callable[..., Engine]:
    """`chain(logits, proposer)`: an engine over a table of four letters."""
    one_hot = np.eye(4, dtype=np.float32)

    def make(logits_VV: np.ndarray, proposer: Proposer | None = None, **options: Any) -> Engine:
        return Engine(
            Chain(logits_VV),
            lambda ids: one_hot[np.asarray(ids)],
            kv_layouts(config),
            vocab_size=4,
            max_context=64,
            proposer=proposer,
            num_proposed=3,
            **options,
        )

    return make


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (4, 4)).astype(np.float32)


def sampled(seed: int, count: int) -> Request:
    params = SamplingParams(max_tokens=count, temperature=0.8, seed=seed)
    return Request((0,), params, max_tokens=count, eos_token_ids=(), decoder=None)


def test_a_seed_gives_the_same_text_with_prompt_lookup(chain: Callable[..., Engine]) -> None:
    proposer = Counting(PromptLookup())
    together = finish(chain(table(5), proposer), *(sampled(seed, 40) for seed in range(5)))
    assert together == [finish(chain(table(5)), sampled(seed, 40))[0] for seed in range(5)]
    assert proposer.proposed > 100


def test_with_a_draft_texts_are_distributed_as_without(chain: Callable[..., Engine], config: ModelConfig) -> None:
    """All texts of three tokens over four letters, counted against their exact probabilities.

    Pearson's statistic of the 63 free classes is above 103.4 in one of a thousand runs; the seeds are fixed. Where
    proposals are simply taken it is in the thousands.
    """
    count, target = 8000, table(5)
    one_hot = np.eye(4, dtype=np.float32)
    proposer = DraftModel(
        Chain(target + 0.8 * table(6)),
        lambda ids: one_hot[np.asarray(ids)],
        kv_layouts(config),
        max_context=64,
        step_tokens=64,
    )
    engine = chain(target, proposer, max_batch=1)
    texts = Counter(tuple(finish(engine, sampled(seed, 3))[0]) for seed in range(count))
    step = np.exp(target.astype(np.float64) / 0.8)
    step /= step.sum(1, keepdims=True)
    statistic = 0.0
    for a, b, c in itertools.product(range(4), repeat=3):
        expected = count * step[0, a] * step[a, b] * step[b, c]
        statistic += (texts[a, b, c] - expected) ** 2 / expected
    assert statistic < 103.4


def test_a_draft_of_another_vocabulary_is_refused(make_bundle: Any, session: Any, config: ModelConfig) -> None:
    bundle = make_bundle()
    wider = make_bundle("wider", model=dataclasses.replace(config, vocab_size=300))
    with pytest.raises(InputError, match=r"wider has 300 token ids, and .*bundle has 264"):
        LLM(bundle, session=session, draft=wider)
    other = make_bundle("other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"A":', '"~~":').replace('"~":', '"A":').replace('"~~":', '"~":')
    )
    with pytest.raises(InputError, match=r"other has another tokenizer than .*bundle"):
        LLM(bundle, session=session, draft=other, verify=False)


def test_impossible_wishes_are_refused(make_bundle: Any, session: Any) -> None:
    bundle = make_bundle()
    with pytest.raises(InputError, match="expected one"):
        LLM(bundle, session=session, draft=bundle, prompt_lookup=True)
    with pytest.raises(InputError, match="num_speculative_tokens is 0"):
        LLM(bundle, session=session, prompt_lookup=True, num_speculative_tokens=0)
