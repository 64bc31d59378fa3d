"""Score windows on the reference and every candidate in step, a few rows of logits at a time.

Nothing but a few numbers a prediction is kept: memory is one block of [rows, vocab] per build, whatever the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from corral.spec.errors import CheckFailed
from corral.spec.progress import Progress, silent
from corral.validate.build import Build, Logits
from corral.validate.divergence import Divergence, diverge, predict
from corral.validate.statistics import Distribution, Estimate, distribution, estimate, exponential

BLOCK_NUMBERS = 1 << 21  # logits a block: 16 MiB as float64


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One candidate against the reference. Agreements are shares, 0 to 1; KL in nats a token."""

    kl: Distribution
    top1_agreement: Estimate
    top5_agreement: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate  # to the reference's, on the same tokens: shared difficulty cancels


@dataclass
class _Tally:
    """What is kept of the predictions of one build: one list of blocks a window."""

    windows: list[list[Divergence]] = field(default_factory=list)

    def per_window(self, name: str) -> list[NDArray[np.float64]]:
        return [
            np.concatenate([getattr(block, name) for block in blocks]).astype(np.float64) for blocks in self.windows
        ]


def measure_accuracy(
    reference: Build, candidates: Sequence[Build], windows: Sequence[Sequence[int]], *, progress: Progress = silent
) -> tuple[Estimate, list[Accuracy]]:
    """Return (the reference's perplexity, one Accuracy per candidate). Raises CheckFailed for logits not finite."""
    builds = [reference, *candidates]
    rows = max(1, BLOCK_NUMBERS // reference.config.vocab_size)
    tallies = [_Tally() for _ in candidates]
    surprise: list[NDArray[np.float64]] = []
    total, done = sum(len(window) - 1 for window in windows), 0
    for window in windows:
        came = np.asarray(window[1:], dtype=np.int64)
        for tally in tallies:
            tally.windows.append([])
        surprises = []
        streams = [reblock(build.logits(window), rows, len(came)) for build in builds]
        start = 0
        for blocks in zip(*streams, strict=True):
            _check_finite(blocks, builds, done + start)
            came_n = came[start : start + len(blocks[0])]
            prediction = predict(blocks[0], came_n)
            surprises.append(prediction.surprise_n)
            for tally, block in zip(tallies, blocks[1:], strict=True):
                tally.windows[-1].append(diverge(prediction, block, came_n))
            start += len(came_n)
            progress("score", done + start, total, "tokens")
        surprise.append(np.concatenate(surprises))
        done += len(came)
    return exponential(estimate(surprise)), [_summary(tally, surprise) for tally in tallies]


def reblock(blocks: Iterable[Logits], rows: int, count: int) -> Iterator[Logits]:
    """The first `count` rows of `blocks`, in blocks of `rows` (the last may be shorter)."""
    held: list[Logits] = []
    left = count
    for block in blocks:
        while len(block) and left:
            wanted = min(left, rows - sum(map(len, held)))
            held.append(block[:wanted])
            block = block[wanted:]
            left -= len(held[-1])
            if not left or sum(map(len, held)) == rows:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held = []
    if left:
        raise AssertionError(f"{left} of {count} rows of logits never came")


def _summary(tally: _Tally, reference_surprise: Sequence[NDArray[np.float64]]) -> Accuracy:
    surprise = tally.per_window("surprise_n")
    ratio = [ours - theirs for ours, theirs in zip(surprise, reference_surprise, strict=True)]
    return Accuracy(
        kl=distribution(tally.per_window("kl_n")),
        top1_agreement=estimate(tally.per_window("same_top1_n")),
        top5_agreement=estimate(tally.per_window("in_top5_n")),
        perplexity=exponential(estimate(surprise)),
        perplexity_ratio=exponential(estimate(ratio)),
    )


def _check_finite(blocks: Sequence[Logits], builds: Sequence[Build], first: int) -> None:
    for build, block in zip(builds, blocks, strict=True):
        finite = np.isfinite(block).all(axis=-1)
        if not finite.all():
            at = int(np.argmin(finite))
            raise CheckFailed(
                f"{build.name} gives logits that are not finite (prediction {first + at}); expected finite numbers. "
                "The weights overflow in this build's number format: compile with wider ones (--weights fp32) to see."
            )
