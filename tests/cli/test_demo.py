from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.cli import demo
from corral.spec.recipe import Recipe

Corral = Callable[..., Any]


@pytest.fixture
def small_demo(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo on a tiny random checkpoint."""
    checkpoint = tmp_path / "demo-tiny"
    shutil.copytree(tiny_checkpoint("scout"), checkpoint)
    (checkpoint / demo.HELD_OUT).write_text("import os\nprint(os.environ)\n" * 20)
    monkeypatch.setattr(demo, "find_checkpoint", lambda: checkpoint)
    recipes = tuple(Recipe(target="cpu", weights=weights, group_size=32) for weights in ("fp32", "int8", "int4"))
    monkeypatch.setattr(demo, "RECIPES", recipes)
    return tmp_path / "out"


def test_the_story_has_five_steps_and_a_table(corral: Corral, small_demo: Path) -> None:
    shown = corral("demo", "--out", small_demo, "--tokens", 200).stdout
    steps = [line.split()[:2] for line in shown.splitlines() if line[:1].isdigit()]
    assert steps == [["1", "reference"], ["2", "export"], ["3", "quantize"], ["4", "run"], ["5", "validate"]]
    table = [line.split()[0] for line in shown.splitlines() if line.startswith("   ") and line[3:4].isalnum()]
    assert table[:5] == ["build", "demo-tiny", "fp32", "int8", "int4"]
    assert "next: corral run" in shown
    assert sorted(path.name for path in small_demo.iterdir()) == ["fp32", "int4", "int8"]
    again = json.loads(corral("demo", "--out", small_demo, "--tokens", 100, "--json").stdout)
    assert [candidate["name"] for candidate in again["candidates"]] == ["fp32", "int8", "int4"]


def test_something_else_in_its_place_is_left_alone(corral: Corral, small_demo: Path) -> None:
    (small_demo / "fp32").mkdir(parents=True)
    (small_demo / "fp32/thesis.txt").write_text("years of work")
    assert "holds something that is no bundle" in corral("demo", "--out", small_demo, code=2).stderr
    assert (small_demo / "fp32/thesis.txt").read_text() == "years of work"


def test_an_installation_without_the_demo_model_says_where_it_is(
    corral: Corral, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages/corral/cli/demo.py"))
    result = corral("demo", "--out", tmp_path, code=3)
    assert "Clone the repository and run `make demo`" in result.stderr
