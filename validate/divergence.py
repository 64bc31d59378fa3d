"""Two rows of logits -> how far apart they are: KL divergence, agreement, surprise. Pure functions, float64 inside.

Letters in names: n predictions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TOP = 5


@dataclass(frozen=True)
class Prediction:
    """A block of predictions of the reference, computed once and held against each candidate."""

    log_p_nV: Floats
    top_n: Ints  # its most likely token
    surprise_n: Floats  # -log p of the token that came, in nats


@dataclass(frozen=True)
class Divergence:
    """One number a prediction."""

    kl_n: Floats  # nats
    same_top1_n: NDArray[np.bool_]
    in_top5_n: NDArray[np.bool_]  # the reference's most likely token is among the candidate's five
    surprise_n: Floats


def log_softmax(logits_nV: NDArray[np.floating]) -> Floats:
    """log(exp(x) / sum(exp(x))) of each row; the maximum is taken out first, so that exp never overflows."""
    x_nV = logits_nV.astype(np.float64)
    x_nV -= x_nV.max(axis=-1, keepdims=True)
    x_nV -= np.log(np.exp(x_nV).sum(axis=-1, keepdims=True))
    return x_nV


def predict(logits_nV: NDArray[np.floating], came_n: Ints) -> Prediction:
    """What the reference says where token `came_n` came next."""
    log_p_nV = log_softmax(logits_nV)
    return Prediction(log_p_nV, log_p_nV.argmax(axis=-1), _surprise(log_p_nV, came_n))


def diverge(reference: Prediction, logits_nV: NDArray[np.floating], came_n: Ints) -> Divergence:
    """Hold a candidate's logits against the reference.

    KL(p ‖ q) = sum p (log p - log q) (Kullback & Leibler 1951, eq. 2.4), which is never negative; rounding may be.
    """
    log_p_nV, log_q_nV = reference.log_p_nV, log_softmax(logits_nV)
    kl_n = np.einsum("nv,nv->n", np.exp(log_p_nV), log_p_nV - log_q_nV)
    # Rank by counting what is strictly likelier: ties are no disagreement, and nothing is sorted.
    top_score_n1 = np.take_along_axis(log_q_nV, reference.top_n[:, None], axis=-1)
    rank_n = (log_q_nV > top_score_n1).sum(axis=-1)
    return Divergence(np.maximum(kl_n, 0.0), rank_n == 0, rank_n < TOP, _surprise(log_q_nV, came_n))


def _surprise(log_p_nV: Floats, came_n: Ints) -> Floats:
    return -np.take_along_axis(log_p_nV, came_n[:, None], axis=-1)[:, 0]
