"""A synthetic checkpoint goes wherever a checkpoint goes: compile in one command and by stages."""

from __future__ import annotations

from pathlib import Path

from corral.graphs import compile
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.spec.bundle import open_bundle
from corral.spec.recipe import Recipe

INT4 = Recipe(target="cpu", weights="int4", group_size=32)


def test_compile_and_stages_give_the_same_weights(tmp_path: Path) -> None:
    name = Path("synthetic:debug?layers=1")
    whole = compile(name, tmp_path / "whole", INT4)
    export_stage(name, tmp_path / "exported")
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", INT4)
    lower_stage(tmp_path / "quantized", tmp_path / "staged", INT4)
    staged = open_bundle(tmp_path / "staged")
    sums = [{f.path: f.sha256 for f in bundle.manifest.files if "weights" in f.path} for bundle in (whole, staged)]
    assert sums[0] and sums[0] == sums[1]
    assert whole.manifest.source["name"] == "synthetic:debug?layers=1"
    assert whole.manifest.tokenizer is None
