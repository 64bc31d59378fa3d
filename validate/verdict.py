"""Where a candidate is broken: the first part whose answers are wrong though what it is given is right.

Quantization adds noise everywhere, a little in each part. A part is called broken where its noise has half its signal's
power, or its size is off by more than the square root of two, *and* the noise is ten times that of what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from corral.spec.model_config import ModelConfig
from corral.validate.layers import Fidelity, LayerByLayer, LayerFidelity

BROKEN_NOISE = 0.5
GAINS = 2**-0.5, 2**0.5
TIMES_ITS_INPUT = 10.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The first broken part; `layer` is None for embeddings and head, `position` the first wrong token of a window."""

    part: str  # "embeddings", "attention", "router", "feed-forward", "experts" or "head"
    layer: int | None = None
    experts: tuple[int, ...] = ()  # which, where others of the layer are right
    position: int | None = None
    chunk_boundary: bool = False  # at that position a new attention chunk begins, give or take one
    found: Fidelity

    def __str__(self) -> str:
        where = self.part if self.layer is None else f"layer {self.layer}, {self.part}"
        if self.experts:
            named = ", ".join(map(str, self.experts))
            where = f"layer {self.layer}, expert{'s' if len(self.experts) > 1 else ''} {named}"
        if self.position is not None:
            where += f", from token {self.position} of a window on"
        if self.chunk_boundary:
            where += " (the boundary of an attention chunk)"
        return f"{where}: {self.found.signal_to_noise:.1f} dB, {self.found.gain:.2f} times as large as it should be"


def locate(found: LayerByLayer, config: ModelConfig) -> Verdict | None:
    """The first broken part in the order of computation, or None."""
    return next(_broken_parts(found, config), None)


def _broken_parts(found: LayerByLayer, config: ModelConfig) -> Iterator[Verdict]:
    given = found.embeddings
    if _is_broken(given, 0.0):
        yield Verdict(part="embeddings", found=given)
    for layer in found.layers:
        chunk = config.attention_chunk_size if config.layers[layer.layer].kv_class == "chunked" else None
        yield from _attention(layer, given.noise, chunk)
        # What the feed-forward reads is the stream with the attention's noise, too: the layer's own input bounds it from below.
        if layer.router is not None and _is_broken(layer.router, given.noise):
            yield Verdict(part="router", layer=layer.layer, found=layer.router)
        if _is_broken(layer.feed_forward, given.noise):
            yield Verdict(part="feed-forward", layer=layer.layer, found=layer.feed_forward)
        yield from _experts(layer, given.noise)
        given = layer.after
    if _is_broken(found.logits, given.noise):
        yield Verdict(part="head", found=found.logits)


def _is_broken(part: Fidelity, given_noise: float) -> bool:
    wrong = part.noise >= BROKEN_NOISE or not GAINS[0] <= part.gain <= GAINS[1]
    return wrong and part.noise >= TIMES_ITS_INPUT * given_noise


def _attention(layer: LayerFidelity, given_noise: float, chunk: int | None) -> Iterator[Verdict]:
    """Broken as a whole; or right until some token, and wrong as a whole or where a chunk begins."""
    wrong = [i for i, part in enumerate(layer.positions) if _is_broken(part, given_noise)]
    broken = _is_broken(layer.attention, given_noise)
    first = wrong[0] if wrong else 0
    at_chunk = bool(chunk and first and (first + 1) % chunk <= 2)
    if broken or at_chunk:
        yield Verdict(
            part="attention",
            layer=layer.layer,
            position=first or None,
            chunk_boundary=at_chunk,
            found=layer.positions[first] if first else layer.attention,
        )


def _experts(layer: LayerFidelity, given_noise: float) -> Iterator[Verdict]:
    known = [expert for expert in layer.experts if expert.both]
    wrong = [expert for expert in known if _is_broken(expert.answer, given_noise)]
    if wrong:
        worst = min((expert.answer for expert in wrong), key=lambda answer: answer.signal_to_noise)
        which = tuple(expert.expert for expert in wrong) if len(wrong) < len(known) else ()
        yield Verdict(part="experts", layer=layer.layer, experts=which, found=worst)
