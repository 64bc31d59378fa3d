"""`LLM`: a bundle that generates, chats and scores. Names and meanings are vLLM's where vLLM has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.chat import Message
from corral.runtime.completion import Completion, Piece
from corral.runtime.embedding import EmbeddingTable
from corral.runtime.engine import MAX_WAITING, Engine
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.request import Request
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.session import Float32, Session
from corral.runtime.tokenizer import Tokenizer, open_tokenizer
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.manifest import Manifest
from corral.spec.model_config import ModelConfig
from corral.spec.progress import Progress, silent
from corral.spec.target import target_named

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Prompt = str | TokenIds

# Caches grow with use, so the limit costs nothing; it is there because a forgotten 10 M tokens would.
DEFAULT_CONTEXT = 131072


NEXT_STAGE = {
    "exported": "Run `corral quantize`, then `corral lower`",
    "quantized": "Run `corral lower` on it",
    "lowered": "Run `corral build` on it",
}


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
        progress: Progress = silent,
        session: Session | None = None,  # something else that computes the decoder, for experiments and tests
    ) -> None:
        bundle = path if isinstance(path, Bundle) else open_bundle(path, verify=verify, progress=progress)
        if bundle.manifest.stage != "ready":
            raise InputError(
                f'{bundle.directory} is at stage "{bundle.manifest.stage}", expected "ready": it cannot run yet. '
                f"{NEXT_STAGE[bundle.manifest.stage]}, or `corral compile` on the checkpoint."
            )
        for name, number in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}, expected a whole number of at least 1.")
        self.bundle = bundle
        self.max_context = _context(bundle.manifest, max_context)
        self.tokenizer = open_tokenizer(bundle)  # None: the bundle takes and gives token ids only
        self._engine = Engine(
            session or _open_session(bundle, provider, threads),
            EmbeddingTable(bundle),
            bundle.manifest.kv,
            vocab_size=bundle.manifest.model.vocab_size,
            max_context=self.max_context,
            max_batch=min(max_batch, bundle.manifest.recipe.max_batch) if bundle.manifest.engines else max_batch,
            max_waiting=max_waiting,
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
        requests = [self._request(i, p) for i, p in zip(ids, _as_params(params, len(ids)), strict=True)]
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
        return self.generate(
            [self._need_tokenizer().apply_chat_template(c, **variables) for c in conversations], params
        )

    def chat_stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Iterator[Piece]:
        """Answer a conversation piece by piece."""
        return self.stream(self._need_tokenizer().apply_chat_template(messages, **variables), params)

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

    def _request(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Request:
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


def _open_session(bundle: Bundle, provider: str, threads: int | None) -> Session:
    """What computes a bundle: the GPU that its engines are for, or ONNX Runtime on what its target is for."""
    if bundle.manifest.engines:
        from corral.runtime.tensorrt_session import TensorRTSession

        return TensorRTSession(bundle)
    if target_named(bundle.manifest.recipe.target).provider == "cuda":
        from corral.runtime.onnxruntime_cuda_session import OnnxRuntimeCudaSession

        return OnnxRuntimeCudaSession(bundle, threads=threads)
    return OnnxRuntimeSession(bundle, provider=provider, threads=threads)


def _context(manifest: Manifest, max_context: int | None) -> int:
    most, why = manifest.model.max_position_embeddings, "which the model was made for"
    if manifest.engines and manifest.recipe.max_context < most:
        most, why = manifest.recipe.max_context, "which its engines were built for (--max-context of `corral compile`)"
    if max_context is None:
        return min(most, DEFAULT_CONTEXT)
    if isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 <= max_context <= most:
        raise InputError(f"max_context is {max_context!r}, expected 1 to {most} tokens, {why}.")
    return max_context


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
