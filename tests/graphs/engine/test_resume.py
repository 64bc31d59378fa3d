"""Builds that were ended in the middle, and go on: what is finished is kept, what is torn or of something else is not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.graphs import compile
from corral.graphs.engine import engines
from corral.graphs.engine.build import Engine, build_engine
from corral.graphs.engine.engines import build_engines
from corral.spec.bundle import open_bundle
from corral.spec.errors import InputError
from corral.spec.manifest import MANIFEST_NAME
from corral.spec.recipe import Recipe

pytest.importorskip("tensorrt_rtx")

Checkpoint = Callable[[str], Path]
RECIPE = Recipe(target="tensorrt-rtx", weights="int4", group_size=32, stages=2, gpu="8.9")


class Builds:
    """Counts the builds that are begun; the one numbered `ends` is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.ends = 0
        monkeypatch.setattr(engines, "build_engine", self)

    def __call__(self, graph: Path, name: str, *settings: Any) -> Engine:
        self.names.append(name)
        if len(self.names) == self.ends:
            raise KeyboardInterrupt
        return build_engine(graph, name, *settings)


@pytest.fixture(scope="module")
def interrupted(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compile in two stages leaves that ended in the second engine. Do not write into it."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        Builds(monkeypatch).ends = 2
        with pytest.raises(KeyboardInterrupt):
            compile(tiny_checkpoint("two_layers"), out, RECIPE)
    return out


@pytest.fixture
def out(interrupted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "out")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def test_the_same_compile_goes_on_behind_the_engines_that_are_finished(
    tiny_checkpoint: Checkpoint, out: Path, builds: Builds
) -> None:
    assert open_bundle(out).manifest.stage == "lowered"
    first = (out / "decoder-00.sm89.engine").read_bytes()
    bundle = compile(tiny_checkpoint("two_layers"), out, RECIPE)
    assert builds.names == ["decoder-01.sm89.engine"]
    assert (out / "decoder-00.sm89.engine").read_bytes() == first
    assert [engine.graph for engine in bundle.manifest.engines] == ["decoder-00.onnx", "decoder-01.onnx"]
    assert open_bundle(out).manifest == bundle.manifest  # every file as it is listed
    assert build_engines(out).manifest == bundle.manifest
    assert len(builds.names) == 1


def test_another_checkpoint_or_recipe_does_not_go_on(
    tiny_checkpoint: Checkpoint, out: Path, builds: Builds, tmp_path: Path
) -> None:
    newer = shutil.copytree(tiny_checkpoint("two_layers"), tmp_path / tiny_checkpoint("two_layers").name)
    (newer / "model.safetensors").touch()
    others = [
        (newer, RECIPE),
        (tiny_checkpoint("scout"), RECIPE),
        (tiny_checkpoint("two_layers"), Recipe(target="tensorrt-rtx", weights="fp16", stages=2, gpu="8.9")),
    ]
    for checkpoint, recipe in others:
        with pytest.raises(InputError, match="holds a bundle already"):
            compile(checkpoint, out, recipe)
    assert builds.names == []


@pytest.mark.parametrize("damage", ["engine", "sidecar", "missing", "weights"])
def test_an_engine_is_built_again_where_it_or_what_it_was_built_of_changed(
    out: Path, builds: Builds, damage: str
) -> None:
    engine, sidecar = out / "decoder-00.sm89.engine", out / "decoder-00.sm89.engine.json"
    if damage == "engine":
        engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    elif damage == "sidecar":
        sidecar.write_bytes(sidecar.read_bytes()[:100])
    elif damage == "missing":
        engine.unlink()
    else:  # as listed, but not those of then
        about = json.loads((out / MANIFEST_NAME).read_text())
        shard = next(file for file in about["files"] if file["path"] == "weights-00000.bin")
        data = bytearray((out / shard["path"]).read_bytes())
        data[-1] ^= 1
        (out / shard["path"]).write_bytes(data)
        shard["sha256"] = hashlib.sha256(data).hexdigest()
        (out / MANIFEST_NAME).write_text(json.dumps(about))
    builds.ends = 2
    with pytest.raises(KeyboardInterrupt):
        build_engines(out)
    assert builds.names == ["decoder-00.sm89.engine", "decoder-01.sm89.engine"]
