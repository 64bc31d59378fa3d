"""A synthetic checkpoint can be a reference."""

from __future__ import annotations

from pathlib import Path

from corral.validate.build import open_build


def test_it_opens_as_a_checkpoint() -> None:
    build = open_build(Path("synthetic:debug?layers=1"), provider="cpu", threads=None)
    assert (build.kind, build.config.num_layers) == ("checkpoint", 1)
    [block] = build.logits([1, 2, 3])
    assert block.shape == (3, 1024)
