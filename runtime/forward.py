"""Token ids in, logits out, over caches: a step of a session, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from corral.runtime.session import Caches, CacheView, Float32, Session, Step


def forward(
    session: Session,
    embed: Callable[[Sequence[int]], Float32],
    cache: Caches,
    view: CacheView[Any],  # of `cache`, as many slots as there are sequences
    tokens: Sequence[Sequence[int]],  # [B][S]
    positions: Sequence[int],  # [B], of each row's first new token
    logit_rows: Sequence[Sequence[int]],  # [B][R], which of the new tokens to compute logits for
) -> Float32:
    """Logits [B, R, vocab]; keys and values of the tokens are in the cache afterwards."""
    rows = embed([token for row in tokens for token in row])
    embeddings = rows.reshape(len(tokens), len(tokens[0]), -1)
    steps = np.arange(embeddings.shape[1], dtype=np.int64)
    return session.run(
        Step(
            embeddings_BSH=embeddings,
            positions_BS=np.array(positions, dtype=np.int64)[:, None] + steps,
            logit_rows_BR=np.array(logit_rows, dtype=np.int64),
            past_length_B=cache.past_lengths(positions),
            caches=view,
        )
    )
