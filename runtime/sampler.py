"""Logits of one request -> its next token: pure functions over numpy arrays, in vLLM's order.

    logits
      -> log probabilities that are reported (if asked for)
      -> forbidden tokens out (end tokens before `min_tokens`)
      -> repetition penalty (tokens of prompt and output), frequency and presence penalties (tokens of the output)
      -> temperature 0: the largest logit, the lowest index on ties (`largest`: of a whole batch at once)
      -> temperature -> min-p -> top-k -> top-p -> one uniform draw from the request's own generator

A filter maps candidates (ids ascending, weights) to fewer candidates. Weights need not sum to 1: each filter takes its
share of what the one before it left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corral.runtime.completion import TokenLogprobs
from corral.runtime.sampling_params import SamplingParams
from corral.spec.errors import CheckFailed

Floats = NDArray[np.floating[Any]]
CERTAIN = np.ones(1)  # the weight of an only candidate


class Candidates(NamedTuple):
    """Tokens that may still be chosen, ids ascending, with their unnormalised probabilities."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]

    def keep(self, mask: NDArray[np.bool_]) -> Candidates:
        return Candidates(self.ids[mask], self.weights[mask])


def distribution(
    logits_V: Floats,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> Candidates:
    """What the next token is drawn from. Raises CheckFailed where the logits hold no largest finite number."""
    logits_V = penalize(forbid(logits_V, forbidden), params, prompt_ids, output_ids)
    best = int(np.argmax(logits_V))
    if not math.isfinite(logits_V[best]):
        raise CheckFailed(
            f"the model's logits are not finite (the largest is {logits_V[best]}), so no token can be chosen. "
            "Check the bundle with `corral validate`, and compile it again if it fails."
        )
    if params.greedy:
        return Candidates(np.array([best]), CERTAIN)
    candidates = weigh(logits_V, params.temperature)
    candidates = keep_min_p(candidates, params.min_p)
    candidates = keep_top_k(candidates, params.top_k)
    return keep_top_p(candidates, params.top_p)


def largest(logits_NV: Floats) -> list[int | None]:
    """The token of each row's largest logit, the lowest on ties; None where that is no finite number."""
    tokens_N = logits_NV.argmax(axis=-1)
    finite_N = np.isfinite(logits_NV[np.arange(len(tokens_N)), tokens_N])
    return [token if finite else None for token, finite in zip(tokens_N.tolist(), finite_N.tolist(), strict=True)]


def forbid(logits_V: Floats, ids: Sequence[int]) -> Floats:
    """Set the logits of `ids` to minus infinity."""
    if not ids:
        return logits_V
    logits_V = logits_V.copy()
    logits_V[list(ids)] = -np.inf
    return logits_V


def penalize(logits_V: Floats, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Floats:
    """Apply repetition (CTRL, arXiv 1909.05858 §4.1, sign-aware), frequency and presence penalties."""
    repetition = params.repetition_penalty != 1
    if not repetition and not params.presence_penalty and not params.frequency_penalty:
        return logits_V
    logits_V = logits_V.copy()
    if repetition and (seen := np.unique(np.asarray([*prompt_ids, *output_ids], dtype=np.int64))).size:
        penalty, logits = params.repetition_penalty, logits_V[seen]
        logits_V[seen] = np.where(logits > 0, logits / penalty, logits * penalty)
    if output_ids:
        written, counts = np.unique(np.asarray(output_ids, dtype=np.int64), return_counts=True)
        logits_V[written] -= params.frequency_penalty * counts + params.presence_penalty
    return logits_V


def weigh(logits_V: Floats, temperature: float) -> Candidates:
    """All tokens with softmax weights at `temperature`, the likeliest weighing 1."""
    with np.errstate(under="ignore"):
        weights = np.exp((logits_V.astype(np.float64) - float(logits_V.max())) / temperature)
    return Candidates(np.arange(len(logits_V)), weights)


def keep_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Keep tokens at least `min_p` times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    if min_p <= 0:
        return candidates
    return candidates.keep(candidates.weights >= min_p * candidates.weights.max())


def keep_top_k(candidates: Candidates, k: int) -> Candidates:
    """Keep exactly the `k` likeliest tokens, the lowest ids on ties; all for k < 1."""
    weights = candidates.weights
    if k < 1 or k >= len(weights):
        return candidates
    threshold = np.partition(weights, len(weights) - k)[len(weights) - k]
    mask = weights > threshold
    ties = np.flatnonzero(weights == threshold)
    mask[ties[: k - int(mask.sum())]] = True
    return candidates.keep(mask)


def keep_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Keep the smallest set of likeliest tokens that holds at least `top_p` (Holtzman et al., arXiv 1904.09751)."""
    if top_p >= 1:
        return candidates
    # Tokens below (1 - p) / n of the total are less than 1 - p together, so they are outside the set: no need to sort
    # the long tail of a 200,000-token vocabulary.
    total = candidates.weights.sum()
    candidates = candidates.keep(candidates.weights >= (1 - top_p) * total / len(candidates.weights))
    order = np.argsort(-candidates.weights, kind="stable")
    mass = np.cumsum(candidates.weights[order])
    needed = int(np.searchsorted(mass, top_p * total)) + 1
    return candidates.keep(np.isin(np.arange(len(order)), order[:needed]))


def draw(candidates: Candidates, uniform: float) -> int:
    """The candidate at quantile `uniform` (in [0, 1)) of the cumulative weights."""
    if len(candidates.ids) == 1:
        return int(candidates.ids[0])
    mass = np.cumsum(candidates.weights)
    # side="right": a candidate of weight 0 is never chosen.
    chosen = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
    return int(candidates.ids[min(chosen, int(np.flatnonzero(candidates.weights)[-1]))])


def token_logprobs(logits_V: Floats, token_id: int, count: int) -> TokenLogprobs:
    """Log probability of `token_id`, and the `count` likeliest tokens, under the logits as they are."""
    shifted = logits_V.astype(np.float64) - float(logits_V.max())
    with np.errstate(under="ignore"):
        logprobs_V = shifted - np.log(np.exp(shifted).sum())
    count = min(count, len(logprobs_V))
    top = keep_top_k(Candidates(np.arange(len(logprobs_V)), logprobs_V), count).ids if count else np.arange(0)
    top = top[np.argsort(-logprobs_V[top], kind="stable")]
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top=tuple((int(i), float(logprobs_V[i])) for i in top),
    )
