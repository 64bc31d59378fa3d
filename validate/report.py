"""The result of a comparison, as data: the reference, each candidate, and how it was measured."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from corral.validate.accuracy import Accuracy
from corral.validate.greedy import GreedyDivergence
from corral.validate.latency import Latency
from corral.validate.layers import Fidelity, LayerByLayer
from corral.validate.statistics import Distribution, Estimate, Spread
from corral.validate.tasks import TaskScore
from corral.validate.verdict import Verdict


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
    greedy: GreedyDivergence
    insides: LayerByLayer | None = None  # where asked for
    verdict: Verdict | None = None  # the part that is broken; None where none is, or nobody looked

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
            "greedy_divergence": {**dataclasses.asdict(self.greedy), "median": self.greedy.median},
            "insides": _insides(self.insides) if self.insides else None,
            "verdict": _verdict(self.verdict) if self.verdict else None,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison. `to_json` is what `corral validate --json` prints: KL in nats a token, seconds, bytes, shares."""

    reference: ReferenceResult
    candidates: tuple[CandidateResult, ...]
    measured: Measured
    tasks: tuple[TaskScore, ...] = ()  # where asked for

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "measured": dataclasses.asdict(self.measured),
            "tasks": [{**dataclasses.asdict(score), "stderr": _finite(score.stderr)} for score in self.tasks],
        }


def _insides(insides: LayerByLayer) -> dict[str, Any]:
    return {
        "tokens": insides.tokens,
        "embeddings": _fidelity(insides.embeddings),
        "layers": [
            {
                "layer": layer.layer,
                "attention": _fidelity(layer.attention),
                "router": _fidelity(layer.router) if layer.router else None,
                "router_agreement": layer.router_agreement,
                "expert_coverage": layer.expert_coverage,
                "feed_forward": _fidelity(layer.feed_forward),
                "experts": [
                    {"expert": e.expert, "tokens": e.tokens, "both": e.both, **_fidelity(e.answer)}
                    for e in layer.experts
                ],
                "after": _fidelity(layer.after),
            }
            for layer in insides.layers
        ],
        "logits": _fidelity(insides.logits),
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    data = dataclasses.asdict(verdict)
    del data["found"]
    return {**data, **_fidelity(verdict.found), "words": str(verdict)}


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    return {"signal_to_noise": _number(fidelity.signal_to_noise), "gain": _number(fidelity.gain)}


def _estimate(name: str, value: Estimate | Distribution) -> dict[str, Any]:
    return {name: _number(value.mean), f"{name}_stderr": _number(value.stderr)}


def _latency(latency: Latency | None) -> dict[str, Any]:
    if latency is None:
        return {}
    return {
        **_spread("tokens_per_second", latency.tokens_per_second),
        **_spread("time_to_first_token", latency.time_to_first_token),
        "first_tokens": dataclasses.asdict(latency.first_tokens),
        "between_tokens": dataclasses.asdict(latency.between_tokens),
    }


def _spread(name: str, value: Spread) -> dict[str, Any]:
    rest = dataclasses.asdict(value)
    return {name: rest.pop("median"), f"{name}_spread": rest}


def _finite(value: float | None) -> float | None:
    return None if value is None else _number(value)


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
