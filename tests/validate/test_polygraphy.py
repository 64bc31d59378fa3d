"""A bundle opens with Polygraphy: the commands of docs/tensorrt.md, run on tiny bundles."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.graphs.compiler import compile
from corral.graphs.stages import export_stage
from corral.runtime import LLM
from corral.spec.bundle import open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.validate.polygraphy_inputs import step_inputs

pytest.importorskip("polygraphy", reason="the extra polygraphy is not installed")

TinyBundle = Callable[[str, str, str], Path]
TinyCheckpoint = Callable[[str], Path]
SECTION = (Path(__file__).parents[2] / "docs/tensorrt.md").read_text(encoding="utf-8").split("\n## Polygraphy\n")[1]
WIDTHS = ("[1,8,256]", "[1,8,64]")  # of the demo model, of the tiny one


def documented() -> list[list[str]]:
    """The section's indented lines as commands, in order; those of Polygraphy only."""
    lines = "\n".join(line[4:] for line in SECTION.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    return [shlex.split(line.replace(*WIDTHS)) for line in lines.splitlines() if line.startswith("polygraphy ")]


COMMANDS = documented()


def run(command: list[str], where: Path) -> str:
    """What a command says; fails where it does."""
    script = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "XDG_CACHE_HOME": str(where / "cache"), "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([str(script), *command[1:]], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("polygraphy")
    compile(tiny_checkpoint("scout"), where / "scout-fp32", Recipe(target="portable", weights="fp32"))
    rtx = Recipe(target="tensorrt-rtx", weights="int4", group_size=32, max_context=64)
    compile(tiny_checkpoint("scout"), where / "scout-rtx", rtx)
    for bundle in ("fp32", "rtx"):
        run(["corral", "inspect", f"scout-{bundle}", "--inputs", f"{bundle}.json"], where)
    return where


def test_documented_commands_run(bundles: Path) -> None:
    said = {}
    for command in COMMANDS:
        if "reduce" not in command:
            said[" ".join(command[:3])] = run(command, bundles)

    assert "layers.0.feed_forward.experts" in said["polygraphy inspect model"]
    assert json.loads((bundles / "lint.json").read_text())["summary"]["failing"] == []
    assert said["polygraphy run scout-rtx/decoder.onnx"].count("| PASSED") == 6  # five layers and the logits
    assert "Output: layers.0.feed_forward.Add:0 is valid" in said["polygraphy run feed-forward.onnx"]


def test_documented_reduction_finds_a_small_part(bundles: Path) -> None:
    """With a check that is quicker than the documented one: it fails where the graph has one certain node."""
    import onnx

    run(next(command for command in COMMANDS if "extract" in command), bundles)
    command = next(command for command in COMMANDS if "reduce" in command)
    culprit = "layers.0.feed_forward.experts.CumSum"
    (bundles / "check.py").write_text(
        "import onnx, sys\n"
        "model = onnx.load('polygraphy_debug.onnx', load_external_data=False)\n"
        f"sys.exit(any(node.name == '{culprit}' for node in model.graph.node))\n"
    )

    run([*command[: command.index("--check") + 1], sys.executable, "check.py"], bundles)

    part, whole = (onnx.load(bundles / name).graph.node for name in ("part.onnx", "feed-forward.onnx"))
    assert culprit in {node.name for node in part}
    assert len(part) < len(whole) / 4


def test_documented_check_builds_an_engine_without_a_gpu(bundles: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    command = next(command for command in COMMANDS if "reduce" in command)
    check = command[command.index("--check") + 1 :]

    run([part.replace("polygraphy_debug.onnx", "scout-rtx/decoder.onnx") for part in check], bundles)

    assert (bundles / "debug.engine").stat().st_size > 0


def test_inputs_are_those_of_a_prompt(tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the graph on these inputs are what the runtime says of the same tokens."""
    import onnxruntime

    directory = tiny_bundle("scout", "cpu", "fp32")
    bundle = open_bundle(directory)
    tokens = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 8).tolist()

    session = onnxruntime.InferenceSession(str(directory / "decoder.onnx"))
    (logits,) = session.run(["logits"], step_inputs(bundle))

    expected = np.concatenate(list(LLM(directory).score_pieces(tokens)))[-1]
    np.testing.assert_allclose(logits[0, 0], expected, rtol=0, atol=1e-5)


def test_inputs_end_where_a_chunk_does(tiny_bundle: TinyBundle) -> None:
    bundle = open_bundle(tiny_bundle("scout", "cpu", "fp32"))

    inputs: dict[str, Any] = step_inputs(bundle, tokens=100)

    assert inputs["positions"].tolist() == [list(range(16))]
    assert inputs["past_key.3"].shape == (1, 2, 16, 16)
    assert inputs["logit_rows"].tolist() == [[15]]


def test_an_unfinished_bundle_has_no_inputs(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    exported = export_stage(tiny_checkpoint("two_layers"), tmp_path / "exported")

    with pytest.raises(InputError, match="unfinished"):
        step_inputs(exported)
