"""A token drawn from one distribution becomes a token of another: the rule that makes a draft model exact.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), §2.3 and appendix A.1;
the same in Chen et al. (arXiv 2302.01318), theorem 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from corral.runtime.sampler import Candidates, draw


def accept_or_replace(token: int, draft: Candidates, target: Candidates, generator: np.random.Generator) -> int:
    """`token`, drawn from `draft`, with probability min(1, target/draft); otherwise a draw from what target has more.

    The result is distributed as `target`, and it equals `token` exactly where that was accepted: what is rejected has
    less weight in `target`, so none in the rest.
    """
    drafted = _share(draft, np.array([token]))[0]
    wanted = _share(target, np.array([token]))[0]
    if generator.random() * drafted < wanted:
        return token
    rest = np.maximum(target.weights / target.weights.sum() - _share(draft, target.ids), 0)
    return draw(Candidates(target.ids, rest), generator.random())


def _share(candidates: Candidates, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of each of `ids`; 0 for what is no candidate."""
    at = np.minimum(np.searchsorted(candidates.ids, ids), len(candidates.ids) - 1)
    weights = np.where(candidates.ids[at] == ids, candidates.weights[at], 0)
    return weights / candidates.weights.sum()
