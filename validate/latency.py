"""How fast builds are: time to first token and decode speed, repeated, the builds taking turns so that drift hits all.

One run prefills the same prompt and decodes the same number of tokens greedily, one sequence at a time. Time to first
token is from the call to the first token; decode speed counts the tokens after the first. The first round is warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corral.spec.progress import Progress, silent
from corral.validate.build import Build, Run
from corral.validate.statistics import Quantiles, Spread, quantiles, spread

REPEATS = 5
WARM_UP_ROUNDS = 1
PROMPT_TOKENS = 64
DECODE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Speed of one build: tokens per second while decoding, seconds to the first token and from each to the next."""

    tokens_per_second: Spread
    time_to_first_token: Spread
    first_tokens: Quantiles
    between_tokens: Quantiles


def measure_latency(
    builds: Sequence[Build],
    prompt: Sequence[int],
    *,
    tokens: int = DECODE_TOKENS,
    repeats: int = REPEATS,
    progress: Progress = silent,
) -> list[Latency | None]:
    """One Latency per build, in order; None for a build whose speed says nothing (the PyTorch reference)."""
    runs: list[list[Run]] = [[] for _ in builds]
    rounds = WARM_UP_ROUNDS + repeats
    for turn in range(rounds):
        # Each round begins with another build, so that none is always the one after a pause.
        for i in (index % len(builds) for index in range(turn, turn + len(builds))):
            run = builds[i].time_decode(prompt, tokens)
            if run is not None and turn >= WARM_UP_ROUNDS:
                runs[i].append(run)
        progress("time", turn + 1, rounds, "rounds")
    return [_summary(measured) if measured else None for measured in runs]


def _summary(runs: Sequence[Run]) -> Latency:
    return Latency(
        tokens_per_second=spread([run.tokens_per_second for run in runs]),
        time_to_first_token=spread([run.time_to_first_token for run in runs]),
        first_tokens=quantiles([run.time_to_first_token for run in runs]),
        between_tokens=quantiles([seconds for run in runs for seconds in run.between_tokens]),
    )
