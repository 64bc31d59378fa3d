"""`LLM`: a bundle that generates, chats and scores. Names and meanings are vLLM's where vLLM has them."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.chat import Message
from corral.runtime.completion import Completion, Piece
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.engine import MAX_WAITING, STEP_TOKENS, Engine
from corral.runtime.prefix_file import read_prefix, write_prefix
from corral.runtime.ready_bundle import chosen_context, longest_context, open_ready, open_session, wide_batches
from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.session import Float32, Session
from corral.runtime.speculative.draft_model import DRAFTED_TOKENS, DraftModel, check_draft
from corral.runtime.speculative.prompt_lookup import LOOKED_UP_TOKENS, PromptLookup
from corral.runtime.speculative.proposal import Proposer
from corral.runtime.tokenizer import Tokenizer, open_tokenizer
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError
from corral.spec.model_config import ModelConfig
from corral.spec.progress import Progress, silent

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Prompt = str | TokenIds


class LLM:
    """An opened bundle. Several threads may use one LLM; their requests are batched together."""

    def __init__(
        self,
        path: str | Path | Bundle,
        provider: str = "cpu",
        max_context: int | None = None,
        threads: int | None = None,
        verify: bool = True,
        max_batch: int = 16,
        max_waiting: int = MAX_WAITING,  # requests in line, besides those that run
        draft: str | Path | Bundle | None = None,  # a smaller model's bundle that guesses the next tokens
        prompt_lookup: bool = False,  # or guess them where the same tokens stood before
        num_speculative_tokens: int | None = None,  # of such tokens, at a time; None: as many as usually pay
        prefix_cache_gb: float = 0,  # of cache rows kept for prompts that begin alike
        progress: Progress = silent,
        session: Session | None = None,  # something else that computes the decoder, for experiments and tests
    ) -> None:
        bundle = open_ready(path, verify, progress)
        for name, number in (
            ("max_batch", max_batch),
            ("max_waiting", max_waiting),
            ("num_speculative_tokens", 1 if num_speculative_tokens is None else num_speculative_tokens),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}, expected a whole number of at least 1.")
        if isinstance(prefix_cache_gb, bool) or not 0 <= prefix_cache_gb < math.inf:
            raise InputError(f"prefix_cache_gb is {prefix_cache_gb!r}, expected a number of GB, or 0 for none.")
        if draft is not None and prompt_lookup:
            raise InputError("draft and prompt_lookup were both given, expected one: both guess the next tokens.")
        self.bundle = bundle
        self.max_context = chosen_context(bundle.manifest, max_context)
        self.tokenizer = open_tokenizer(bundle)  # None: the bundle takes and gives token ids only
        proposer: Proposer | None = PromptLookup() if prompt_lookup else None
        if draft is not None:
            draft = open_ready(draft, verify, progress)
            check_draft(draft, open_tokenizer(draft), bundle, self.tokenizer)
            proposer = DraftModel(
                open_session(draft, provider, threads),
                EmbeddingTable(draft),
                draft.manifest.kv,
                max_context=min(self.max_context, longest_context(draft.manifest)[0]),
                step_tokens=STEP_TOKENS,
            )
        self._engine = Engine(
            session or open_session(bundle, provider, threads),
            EmbeddingTable(bundle),
            bundle.manifest.kv,
            vocab_size=bundle.manifest.model.vocab_size,
            max_context=self.max_context,
            max_batch=min(max_batch, bundle.manifest.recipe.max_batch) if bundle.manifest.engines else max_batch,
            max_waiting=max_waiting,
            proposer=proposer,
            num_proposed=num_speculative_tokens or (LOOKED_UP_TOKENS if prompt_lookup else DRAFTED_TOKENS),
            prefix_bytes=int(prefix_cache_gb * 1e9),
            wide_batches=wide_batches(bundle.manifest),
        )

    @property
    def config(self) -> ModelConfig:
        return self.bundle.manifest.model

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many, together; a prompt is a text or a list of token ids."""
        ids = [self._prompt_ids(prompt) for prompt in _as_prompts(prompts)]
        requests = [
            self._request(i, p, in_pieces=False) for i, p in zip(ids, _as_params(params, len(ids)), strict=True)
        ]
        outside = deque(requests)  # of a batch larger than the line, the rest waits here
        try:
            while not all(request.done for request in requests):
                while outside and self._engine.offer(outside[0]):
                    outside.popleft()
                self._engine.step()
        finally:  # after an interrupt, too
            for request in requests:
                self._engine.cancel(request)
        return [request.completion() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Complete one prompt in pieces; the last piece says why it ended. Closing the iterator ends the request."""
        return self._stream(self._request(self._prompt_ids(prompt), params or SamplingParams()))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **variables: Any,
    ) -> list[Completion]:
        """Answer one conversation or many; `variables` go to the chat template."""
        many = bool(messages) and isinstance(messages, Sequence) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if many else [messages]
        return self.generate([self.conversation(c, **variables) for c in conversations], params)

    def chat_stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Iterator[Piece]:
        """Answer a conversation piece by piece."""
        return self.stream(self.conversation(messages, **variables), params)

    def conversation(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt that a conversation is, as token ids; `variables` go to the chat template."""
        return self._need_tokenizer().apply_chat_template(messages, **variables)

    def score(self, token_ids: TokenIds) -> Float32:
        """Teacher-forced logits [tokens, vocab]: row t predicts token t + 1. For long texts: `score_pieces`."""
        ids = self._check_ids(token_ids)
        logits = np.empty((len(ids), self.config.vocab_size), dtype=np.float32)
        row = 0
        for piece in self._engine.score_pieces(ids):
            logits[row : row + len(piece)] = piece
            row += len(piece)
        return logits

    def score_pieces(self, token_ids: TokenIds) -> Iterator[Float32]:
        """`score` as consecutive blocks [n, vocab], so that a long text's logits are never all in memory."""
        return self._engine.score_pieces(self._check_ids(token_ids))

    def save_prefix(self, prompt: Prompt, path: str | Path) -> int:
        """Write the cache rows of a prompt that was run before to a file; returns how many of its tokens they are.

        0, and no file, where it is shorter than the 16 tokens that are kept at a time. Raises InputError where there is no
        prefix cache, or nothing of the prompt in it.
        """
        ids = self._prompt_ids(prompt)
        return self._engine.with_prefixes(lambda known: write_prefix(Path(path), self._digest, ids, known))

    def load_prefix(self, path: str | Path) -> int:
        """Take the cache rows of a file that this bundle wrote; returns the tokens that need not be computed again.

        Raises InputError for a file that is damaged, of another bundle or larger than the prefix cache.
        """
        return self._engine.with_prefixes(lambda known: read_prefix(Path(path), self._digest, known))

    @property
    def _digest(self) -> str:
        """What tells this bundle's cache rows from another's: the manifest names the SHA-256 of every file."""
        return hashlib.sha256(self.bundle.manifest.dumps().encode()).hexdigest()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{self.bundle.directory} has no tokenizer, so it takes and gives token ids only. Pass lists of ids, "
                "or compile a checkpoint directory that holds a tokenizer.json."
            )
        return self.tokenizer

    def _stream(self, request: Request) -> Iterator[Piece]:
        self._engine.add(request)
        try:
            while True:
                done = request.done  # before the pieces: another thread may add the last one meanwhile
                while request.pieces:
                    yield request.pieces.popleft()
                if request.error is not None:
                    raise request.error
                if done:
                    return
                self._engine.step()
        finally:
            self._engine.cancel(request)

    def _request(self, prompt_ids: tuple[int, ...], params: SamplingParams, *, in_pieces: bool = True) -> Request:
        if not isinstance(params, SamplingParams):
            raise InputError(f"params is a {type(params).__name__}, expected SamplingParams.")
        if params.stop and self.tokenizer is None:
            raise InputError(f"stop strings need text, and {self.bundle.directory} has no tokenizer. Leave `stop` out.")
        if len(prompt_ids) >= self.max_context:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer in max_context "
                f"{self.max_context}. Shorten it, or open the LLM with a larger max_context."
            )
        return Request(
            prompt_ids,
            params,
            max_tokens=min(params.max_tokens, self.max_context - len(prompt_ids)),
            eos_token_ids=self.config.eos_token_ids,
            decoder=self.tokenizer.stream_decoder() if self.tokenizer else None,
            in_pieces=in_pieces,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._check_ids(self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)

    def _check_ids(self, token_ids: TokenIds) -> tuple[int, ...]:
        """Raises InputError for no ids, too many, ids that are not integers and ids outside the vocabulary."""
        try:
            ids = np.asarray(token_ids)
        except ValueError:
            ids = np.empty((0, 0))
        if ids.size == 0 or ids.ndim != 1:
            raise InputError("a prompt is empty or nested; expected a text or a flat list of at least one token id.")
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids are {ids.dtype}, expected integers.")
        vocab_size = self.config.vocab_size
        if (wrong := ids[(ids < 0) | (ids >= vocab_size)]).size:
            raise InputError(
                f"token id {wrong[0]} is outside the vocabulary; expected 0 to {vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )
        if len(ids) > self.max_context:
            raise InputError(
                f"{len(ids)} tokens are more than max_context {self.max_context}. "
                "Shorten the text, or open the LLM with a larger max_context."
            )
        return tuple(ids.tolist())


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or many -> many."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not isinstance(prompts, list | tuple):
        raise InputError(
            f"prompts is a {type(prompts).__name__}, expected a text, a list of token ids, or a list of those."
        )
    if prompts and all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in prompts):
        return [prompts]
    for item in prompts:
        if not isinstance(item, str | list | tuple | np.ndarray):
            raise InputError(f"a prompt is a {type(item).__name__}, expected a text or a list of token ids.")
    return list(prompts)


def _as_params(params: Any, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, list | tuple):
        if len(params) != count:
            raise InputError(f"{len(params)} params for {count} prompts; expected one for all, or one each.")
        return list(params)
    return [params] * count
