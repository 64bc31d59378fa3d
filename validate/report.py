"""The result of a comparison, as data: the reference, each candidate, and how it was measured."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from corral.validate.accuracy import Accuracy
from corral.validate.latency import Latency
from corral.validate.statistics import Distribution, Estimate, Spread


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How it was measured: everything that another person needs to measure the same."""

    predictions: int  # tokens whose prediction was scored
    windows: int
    window: int  # tokens
    prompt_tokens: int  # of a timed run
    decode_tokens: int
    repeats: int
    threads: int
    provider: str


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """What the candidates are held against. A checkpoint (the PyTorch model) has no speed."""

    name: str
    kind: str  # "checkpoint" or "bundle"
    bytes: int
    perplexity: Estimate
    latency: Latency | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "bytes": self.bytes,
            **_estimate("perplexity", self.perplexity),
            **_latency(self.latency),
        }


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One candidate: size, what it cost in accuracy, how fast it is."""

    name: str
    bytes: int
    accuracy: Accuracy
    latency: Latency | None

    def to_json(self) -> dict[str, Any]:
        accuracy = self.accuracy
        return {
            "name": self.name,
            "bytes": self.bytes,
            "kl": {key: _number(value) for key, value in dataclasses.asdict(accuracy.kl).items()},
            **_estimate("top1_agreement", accuracy.top1_agreement),
            **_estimate("top5_agreement", accuracy.top5_agreement),
            **_estimate("perplexity", accuracy.perplexity),
            **_estimate("perplexity_ratio", accuracy.perplexity_ratio),
            **_latency(self.latency),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison. `to_json` is what `corral validate --json` prints: KL in nats a token, seconds, bytes, shares."""

    reference: ReferenceResult
    candidates: tuple[CandidateResult, ...]
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "measured": dataclasses.asdict(self.measured),
        }


def _estimate(name: str, value: Estimate | Distribution) -> dict[str, Any]:
    return {name: _number(value.mean), f"{name}_stderr": _number(value.stderr)}


def _latency(latency: Latency | None) -> dict[str, Any]:
    if latency is None:
        return {}
    return _spread("tokens_per_second", latency.tokens_per_second) | _spread(
        "time_to_first_token", latency.time_to_first_token
    )


def _spread(name: str, value: Spread) -> dict[str, Any]:
    rest = dataclasses.asdict(value)
    return {name: rest.pop("median"), f"{name}_spread": rest}


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
