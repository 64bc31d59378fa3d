"""One prompt on its way to a completion: what was read, what was written, and why it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np

from corral.runtime import sampler
from corral.runtime.completion import Completion, FinishReason, Piece, Timings, TokenLogprobs
from corral.runtime.sampling_params import SamplingParams
from corral.runtime.session import Float32
from corral.runtime.speculative.sampling import accept_or_replace
from corral.runtime.stop_strings import StopStrings
from corral.runtime.stream_decoder import StreamDecoder


class Request:
    """The state of one generation. The engine moves `position`; `accept` takes the logits of the next token."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        max_tokens: int,  # `params.max_tokens`, or what the context leaves of it
        eos_token_ids: Collection[int],
        decoder: StreamDecoder | None,  # None: ids only, all text is ""
        in_pieces: bool = True,  # whether anyone reads it before its end; text is decoded then only if not
    ) -> None:
        self.prompt_ids, self.params, self.max_tokens = prompt_ids, params, max_tokens
        self.position = 0  # tokens in the cache
        self.cached_tokens = 0  # of these, how many the prefix cache had
        self.output_ids: list[int] = []
        self.pieces: deque[Piece] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self._eos = tuple(eos_token_ids)
        self._decoder, self._stops = decoder, StopStrings(params.stop)
        self._at_end = not in_pieces and not params.stop
        self.only_largest = params.only_largest
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reported = 0  # output tokens that are in a piece
        self._started = time.perf_counter()
        self._arrivals: list[float] = []  # of each token, in seconds since then

    @cached_property
    def generator(self) -> np.random.Generator:
        """Of the request's random draws; greedy ones never ask for it, and are spared numpy's module for it."""
        return np.random.default_rng(self.params.seed)

    @property
    def prefilled(self) -> bool:
        return self.position >= len(self.prompt_ids)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def num_prefill(self) -> int:
        """Prompt tokens still to be read."""
        return max(len(self.prompt_ids) - self.position, 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output; the last one's successor is what comes next."""
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens_from(self, start: int) -> list[int]:
        """Tokens of prompt and output from `start` on."""
        read = len(self.prompt_ids)
        return [*self.prompt_ids[start:], *self.output_ids[max(start - read, 0) :]]

    def distribution(self, logits_V: Float32, ahead: Sequence[int] = ()) -> sampler.Candidates:
        """What the next token is drawn from, were the output followed by the tokens `ahead`."""
        written = [*self.output_ids, *ahead] if ahead else self.output_ids
        return sampler.distribution(
            logits_V,
            self.params,
            prompt_ids=self.prompt_ids,
            output_ids=written,
            forbidden=self._eos if len(written) < self.params.min_tokens else (),
        )

    def accept(
        self,
        logits_V: Float32,
        proposed: int | None = None,
        drawn_from: sampler.Candidates | None = None,
        largest: int | None = None,
    ) -> None:
        """Choose the next token, and finish if it ends the request.

        With `proposed`, drawn at random from `drawn_from`, that is the token as often as the logits have it. `largest` is
        the token of the largest logit, where it is known and finite.
        """
        few = len(self.output_ids) < self.params.min_tokens
        if largest is not None and self.only_largest:
            token = largest
        elif proposed is None or drawn_from is None:
            token = sampler.draw(self.distribution(logits_V), self.generator.random())
        else:
            token = accept_or_replace(proposed, drawn_from, self.distribution(logits_V), self.generator)
        if self.params.logprobs is not None:
            self._logprobs.append(sampler.token_logprobs(logits_V, token, self.params.logprobs))
        self.output_ids.append(token)
        self._arrivals.append(time.perf_counter() - self._started)
        self._write(token, few)

    def completion(self) -> Completion:
        """The result of a finished request; raises what went wrong if it failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "completion() of a request that still runs"
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self.params.logprobs is not None else None,
            prompt_token_ids=self.prompt_ids,
            timings=Timings(
                first_token=self._arrivals[0] if self._arrivals else 0.0,
                total=self._arrivals[-1] if self._arrivals else 0.0,
                num_tokens=len(self.output_ids),
                cached_tokens=self.cached_tokens,
                between_tokens=tuple(later - earlier for earlier, later in pairwise(self._arrivals)),
            ),
        )

    def _write(self, token: int, few: bool) -> None:
        ends = token in self._eos and not self.params.ignore_eos
        full = len(self.output_ids) >= self.max_tokens
        if self._at_end and not ends and not full:
            return
        text = ""
        if self._decoder and self._at_end:
            text = self._decoder.whole(self.output_ids[:-1] if ends else self.output_ids)
        elif self._decoder and not ends:
            text = self._decoder.push(token)
        if not few:  # like the end tokens, stop strings count only after min_tokens
            text = self._stops.push(text)
        reason: FinishReason | None = None
        if self._stops.found:
            reason = "stop"
        elif ends or full:
            reason = "stop" if ends else "length"
            text += self._stops.push(self._decoder.flush() if self._decoder else "") + self._stops.flush()
        if text or reason or self._decoder is None:
            self._emit(text, reason)
        self.finish_reason = reason  # last: another thread that sees it takes everything else as complete

    def _emit(self, text: str, reason: FinishReason | None) -> None:
        self._text.append(text)
        tokens = slice(self._reported, len(self.output_ids))
        self._reported = len(self.output_ids)
        self.pieces.append(
            Piece(
                text=text,
                token_ids=tuple(self.output_ids[tokens]),
                finish_reason=reason,
                logprobs=tuple(self._logprobs[tokens]) if self.params.logprobs is not None else None,
            )
        )
