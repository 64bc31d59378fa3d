"""How the next token is chosen and when to stop: vLLM's names and meanings, validated when made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from corral.spec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The wishes of one request. `stop` may be given as one string or any sequence of strings."""

    max_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 and -1 keep all
    top_p: float = 1.0  # keep the smallest set of likeliest tokens with at least this probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or output
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    seed: int | None = None  # None: different each time
    stop: tuple[str, ...] = ()  # generation ends before the first of these
    logprobs: int | None = None  # per token, its log probability and this many of the likeliest ones
    ignore_eos: bool = False
    min_tokens: int = 0  # no end token and no stop string before that many

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, tuple | list) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {self.stop!r}, expected non-empty strings.")
        object.__setattr__(self, "stop", tuple(stop))
        _integer("max_tokens", self.max_tokens, 1)
        _integer("top_k", self.top_k, -1)
        _integer("min_tokens", self.min_tokens, 0)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} is 0, expected more than 0 (1 switches it off).")
        if self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens}).")
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0)
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}, expected true or false.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def only_largest(self) -> bool:
        """Whether the next token is that of the largest logit, whatever came before it."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return self.greedy and not penalties and not self.min_tokens


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number, at least {least}.")


def _number(name: str, value: object, least: float, most: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not least <= float(value) <= most:  # type: ignore[arg-type]
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise InputError(f"{name} is {value!r}, expected a number of at least {least:g}{upper}.")
