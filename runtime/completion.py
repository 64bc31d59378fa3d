"""What comes back: a Completion per prompt, Pieces while streaming, with log probabilities and timings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model itself, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, measured from the moment the request was handed in."""

    first_token: float
    total: float
    num_tokens: int
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache and not computed
    between_tokens: tuple[float, ...] = ()  # from each token to the next

    @property
    def per_token(self) -> float:
        """Mean seconds per token after the first; 0 where there is only one."""
        return (self.total - self.first_token) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some more text of a stream, and the tokens that were generated since the last piece."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None  # None in all but the last piece
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished request. `token_ids` includes the end token, `text` neither it nor the stop string."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason  # "stop": end token or stop string; "length": max_tokens or the context is full
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_token_ids: tuple[int, ...]
    timings: Timings
