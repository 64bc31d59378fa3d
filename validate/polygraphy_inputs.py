"""One step's inputs of a bundle's first graph, as the file that Polygraphy's `--load-inputs` reads.

Polygraphy would make up numbers for shapes and positions that do not go together, and random embeddings. These are a
prompt's first tokens on empty caches, and the same tokens for every bundle of a model, so that bundles can be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.embedding import EmbeddingTable
from corral.runtime.stage_io import stage_io
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.errors import EnvironmentProblem

TOKENS = 8
PIP = 'pip install "corral[polygraphy]"'


def step_inputs(bundle: Bundle, tokens: int = TOKENS) -> dict[str, NDArray[Any]]:
    """Arrays by input name, a batch of one: `tokens` random tokens (or a chunk of them), logits of the last.

    Raises InputError for a bundle that is not finished.
    """
    manifest = bundle.manifest
    chunks = [layout.chunk for layout in manifest.kv if layout.chunk]
    count = min([tokens, *chunks])
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, count)
    made: dict[str, NDArray[Any]] = {
        graph_io.EMBEDDINGS: EmbeddingTable(bundle)(ids.tolist())[None],
        graph_io.POSITIONS: np.arange(count, dtype=np.int64)[None],
        graph_io.LOGIT_ROWS: np.array([[count - 1]], np.int64),
    }
    for layout in manifest.kv:
        made[graph_io.past_length(layout.kv_class)] = np.zeros(1, np.int64)
        shape = (1, layout.num_heads, layout.capacity(count), layout.head_dim)
        for i in layout.layers:
            made |= {name(i): np.zeros(shape, layout.dtype) for name in (graph_io.past_key, graph_io.past_value)}
    wanted = stage_io(manifest.model, manifest.graphs[0]).inputs
    return {name: array for name, array in made.items() if name in wanted}


def polygraphy_file(bundle: Bundle) -> bytes:
    """The file's contents. Raises EnvironmentProblem without Polygraphy, whose own format it is."""
    try:
        from polygraphy.json import to_json
    except ImportError as error:
        raise EnvironmentProblem(
            f"inputs are written in Polygraphy's format, and it does not import: {error}. Run `{PIP}`."
        ) from None
    return str(to_json([step_inputs(bundle)])).encode()
