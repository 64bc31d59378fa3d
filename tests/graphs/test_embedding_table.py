"""A rule for the embedding table: codes and scales in the bundle, rows dequantized where they are gathered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corral.graphs import compile
from corral.model.checkpoint import open_checkpoint
from corral.runtime import LLM
from corral.runtime.embedding import EmbeddingTable
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule

TinyCheckpoint = Callable[[str], Path]


def compiled(checkpoint: Path, out: Path, **changes: object) -> Bundle:
    rule = {"matrices": "embed_tokens", "weights": "int8", "group_size": 32, **changes}
    return compile(checkpoint, out, Recipe(group_size=32, stages=2, rules=(Rule(**rule),)))  # type: ignore[arg-type]


def published_table(checkpoint: Path) -> np.ndarray:
    table: np.ndarray = open_checkpoint(checkpoint).state_dict()["embed_tokens.weight"].float().numpy()
    return table


@pytest.mark.parametrize(("weights", "steps"), [("int8", 127), ("int4", 7)])
def test_rows_differ_from_the_published_ones_by_half_a_step(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, weights: str, steps: int
) -> None:
    checkpoint = tiny_checkpoint("scout")
    bundle = compiled(checkpoint, tmp_path / "out", weights=weights)
    table = published_table(checkpoint)
    ids = np.random.default_rng(0).permutation(len(table))
    difference = np.abs(EmbeddingTable(bundle)(ids) - table[ids]).reshape(len(ids), -1, 32)
    step = np.abs(table[ids]).reshape(len(ids), -1, 32).max(-1) / steps
    assert (difference <= step[:, :, None] * 0.501).all()
    assert difference.max() > 0
    (row,) = (row for row in bundle.manifest.coverage if row.kind == "embedding")
    assert row.stored == f"{weights} g32"
    assert row.bytes == table.size * int(weights[3:]) // 8 + table.size // 32 * 4
    prompt = list(range(3, 40))
    plain = compile(checkpoint, tmp_path / "plain", Recipe(group_size=32))
    ours, theirs = (LLM(b).score(prompt) for b in (bundle, plain))
    assert 0 < np.abs(ours - theirs).max() < np.abs(theirs).max()


def test_a_rule_that_names_no_weights_leaves_the_table_as_published(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("scout")
    bundle = compiled(checkpoint, tmp_path / "out", weights=None, matrices="*")
    assert bundle.manifest.embedding_scales is None
    ids = np.arange(8)
    np.testing.assert_array_equal(EmbeddingTable(bundle)(ids), published_table(checkpoint)[ids])


def test_what_cannot_be_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("scout")
    with pytest.raises(InputError, match="group size 128 does not divide the 64 numbers of an embedding"):
        compiled(checkpoint, tmp_path / "out", group_size=128)
    everything_in_int3 = Recipe(group_size=32, kernels="corral", rules=(Rule(matrices="*", weights="int3"),))
    with pytest.raises(InputError, match="asks for int3 embeddings; a table is stored in int8, int4 or as published"):
        compile(checkpoint, tmp_path / "out", everything_in_int3)
    assert not (tmp_path / "out").exists()
    bundle = compiled(checkpoint, tmp_path / "out")
    for broken, said in (
        ({"embedding_scales": None}, "has float32 scales, and the manifest names none"),
        ({"embedding_scales": {**_scales(bundle), "shape": [320, 7]}}, r"embedding shape is \(320, 7\)"),
        ({"embedding_scales": {**_scales(bundle), "offset": 1 << 20}}, "but the embedding table ends at"),
    ):
        manifest = json.loads(bundle.manifest.dumps()) | broken
        (bundle.directory / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=said):
            EmbeddingTable(open_bundle(bundle.directory, verify=False))


def _scales(bundle: Bundle) -> dict[str, object]:
    assert bundle.manifest.embedding_scales
    return dataclasses.asdict(bundle.manifest.embedding_scales)
