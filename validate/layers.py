"""Where a candidate loses what: each part of each layer against the reference's, on the same tokens.

Both builds run freely, so a part is also given the noise of all parts before it. A part's signal is what the reference
adds to the residual stream there, its noise what the candidate adds differently; both are sums of squares over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from corral.spec.model_config import ModelConfig
from corral.spec.progress import Progress, silent
from corral.validate.insides import Insides, Look

TOKENS = 4096  # are looked at, at most: whole windows
Floats = NDArray[np.float64]
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # of the reference, of the candidate


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How a vector of the candidate's compares with the reference's, over many tokens.

    `signal_to_noise` in dB (infinite where nothing differs); `gain` = <candidate, reference> / <reference, reference>: 1
    where it is as large as it should be, 0 where it is not there.
    """

    signal_to_noise: float
    gain: float

    @property
    def noise(self) -> float:
        """The noise's power as a share of the signal's."""
        return 10 ** (-self.signal_to_noise / 10)


@dataclass(frozen=True, kw_only=True)
class ExpertFidelity:
    """One expert: how many of the tokens the reference sends there, and what both say of those that both send there."""

    expert: int
    tokens: int
    both: int
    answer: Fidelity


@dataclass(frozen=True, kw_only=True)
class LayerFidelity:
    """One layer's parts, in the order of computation; those of experts are None and empty in a dense layer."""

    layer: int
    attention: Fidelity
    positions: tuple[Fidelity, ...]  # attention again, by a token's place in its window
    router: Fidelity | None  # its logits
    router_agreement: float | None  # share of tokens for which both choose the same experts
    feed_forward: Fidelity  # the shared expert's, or the dense layer's
    experts: tuple[ExpertFidelity, ...]
    after: Fidelity  # the residual stream behind the layer

    @property
    def expert_coverage(self) -> float | None:
        """The share of experts that any token visited."""
        return sum(e.tokens > 0 for e in self.experts) / len(self.experts) if self.experts else None


@dataclass(frozen=True, kw_only=True)
class LayerByLayer:
    """All of a candidate, from its embeddings to its logits (less each row's mean, which no probability knows of)."""

    tokens: int
    embeddings: Fidelity
    layers: tuple[LayerFidelity, ...]
    logits: Fidelity


@dataclass
class _Power:
    """Sums of squares, by bucket: of the reference, of the difference, and products of both builds."""

    buckets: int = 1
    sums: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((3, self.buckets))

    def add(
        self, reference: NDArray[np.float32], candidate: NDArray[np.float32], bucket: NDArray[np.int64] | int = 0
    ) -> None:
        """Count [tokens, width] of both, each token in its bucket."""
        index = np.broadcast_to(bucket, len(reference))
        rows = reference.astype(np.float64), candidate.astype(np.float64)
        for i, (a, b) in enumerate(((rows[0], rows[0]), (rows[1] - rows[0], rows[1] - rows[0]), rows)):
            self.sums[i] += np.bincount(index, np.einsum("tw,tw->t", a, b), minlength=self.buckets)

    def fidelity(self, bucket: int | None = None) -> Fidelity:
        """Of one bucket, or of all together."""
        signal, noise, product = (self.sums.sum(axis=1) if bucket is None else self.sums[:, bucket]).tolist()
        if noise == 0 or signal == 0:
            return Fidelity(signal_to_noise=math.inf if noise == 0 else -math.inf, gain=1.0 if noise == 0 else math.inf)
        return Fidelity(signal_to_noise=10 * math.log10(signal / noise), gain=product / signal)


class _Layer:
    """What is summed of one layer."""

    def __init__(self, config: ModelConfig, layer: int, window: int) -> None:
        self.layer, self.moe, self.k = layer, config.layers[layer].moe, config.num_experts_per_tok
        self.positions, self.after, self.feed_forward, self.router = _Power(window), _Power(), _Power(), _Power()
        self.answers = _Power(config.num_local_experts if self.moe else 0)
        self.tokens = np.zeros((2, self.answers.buckets), np.int64)  # the reference sends, both send
        self.seen = self.agreed = 0

    def add(self, before: Pair, insides: tuple[Insides, Insides]) -> Pair:
        """Count a window, given the residual stream before the layer in both builds; returns the one behind it."""

        def both(part: str) -> Pair:
            return _both(insides, f"layers.{self.layer}.{part}")

        between, after = both("between"), both("after")
        self.positions.add(*_minus(between, before), np.arange(len(after[0])))
        forward = _minus(after, between)
        if self.moe:
            answers, logits = both("experts"), both("router")
            self.router.add(*logits)
            self._add_experts(answers, logits)
            forward = _minus(forward, answers)
        self.feed_forward.add(*forward)
        self.after.add(*after)
        return after

    def _add_experts(self, answers: Pair, logits: Pair) -> None:
        ours, theirs = (np.sort(np.argsort(-row, axis=1, kind="stable")[:, : self.k], axis=1) for row in logits)
        same = (ours == theirs).all(axis=1)
        self.seen, self.agreed = self.seen + len(same), self.agreed + int(same.sum())
        for choice in range(self.k):
            for row, which in enumerate((ours[:, choice], ours[same, choice])):
                self.tokens[row] += np.bincount(which, minlength=self.answers.buckets)
            self.answers.add(answers[0][same], answers[1][same], ours[same, choice])

    def result(self) -> LayerFidelity:
        return LayerFidelity(
            layer=self.layer,
            attention=self.positions.fidelity(),
            positions=tuple(self.positions.fidelity(i) for i in range(self.positions.buckets)),
            router=self.router.fidelity() if self.moe else None,
            router_agreement=self.agreed / self.seen if self.moe else None,
            feed_forward=self.feed_forward.fidelity(),
            experts=tuple(
                ExpertFidelity(expert=e, tokens=int(sent), both=int(both), answer=self.answers.fidelity(e))
                for e, (sent, both) in enumerate(self.tokens.T)
            ),
            after=self.after.fidelity(),
        )


def measure_layers(
    reference: Look,
    candidate: Look,
    config: ModelConfig,
    windows: Sequence[Sequence[int]],
    *,
    progress: Progress = silent,
) -> LayerByLayer:
    """Look into both builds on the first whole windows, `TOKENS` tokens at most (one window at least)."""
    chosen = windows[: max(1, TOKENS // max(map(len, windows)))]
    embeddings, logits = _Power(), _Power()
    layers = [_Layer(config, i, max(map(len, chosen))) for i in range(config.num_layers)]
    total, done = sum(map(len, chosen)), 0
    for window in chosen:
        insides = reference(window), candidate(window)
        stream = _both(insides, "embeddings")
        embeddings.add(*stream)
        for layer in layers:
            stream = layer.add(stream, insides)
        ours, theirs = _both(insides, "logits")
        logits.add(ours - ours.mean(axis=1, keepdims=True), theirs - theirs.mean(axis=1, keepdims=True))
        done += len(window)
        progress("look inside", done, total, "tokens")
    return LayerByLayer(
        tokens=total,
        embeddings=embeddings.fidelity(),
        layers=tuple(layer.result() for layer in layers),
        logits=logits.fidelity(),
    )


def _both(insides: tuple[Insides, Insides], name: str) -> Pair:
    return insides[0][name], insides[1][name]


def _minus(a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]
