"""How long a candidate writes the same greedy text as the reference.

The reference continues a few prompts. Up to the first difference both have read the same tokens, so that one
teacher-forced pass of the candidate over the reference's text finds it: the first token that is not its likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from corral.spec.progress import Progress, silent
from corral.validate.build import Build
from corral.validate.latency import DECODE_TOKENS, PROMPT_TOKENS

PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class GreedyDivergence:
    """Per prompt, how many tokens come out alike before the first that differs; `tokens` where all of them do."""

    alike: tuple[int, ...]
    tokens: int

    @property
    def median(self) -> float:
        return median(self.alike)


def measure_greedy(
    reference: Build,
    candidates: Sequence[Build],
    windows: Sequence[Sequence[int]],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    tokens: int = DECODE_TOKENS,
    progress: Progress = silent,
) -> list[GreedyDivergence]:
    """One result per candidate, over the beginnings of the first windows (of the longest alone where they are short)."""
    prompts = [window[:prompt_tokens] for window in windows if len(window) >= prompt_tokens][:PROMPTS]
    prompts = prompts or [max(windows, key=len)]
    progress("continue", 0, len(candidates) + 1, "builds")
    texts = reference.continue_greedily(prompts, tokens)
    found = []
    for done, candidate in enumerate(candidates):
        progress("continue", done + 1, len(candidates) + 1, "builds")
        alike = [_alike(candidate, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        found.append(GreedyDivergence(alike=tuple(alike), tokens=tokens))
    progress("continue", len(candidates) + 1, len(candidates) + 1, "builds")
    return found


def _alike(candidate: Build, prompt: Sequence[int], text: Sequence[int]) -> int:
    likeliest = np.concatenate([block.argmax(axis=-1) for block in candidate.logits([*prompt, *text])])
    same = likeliest[len(prompt) - 1 : -1] == np.asarray(text)
    return len(text) if same.all() else int(same.argmin())
