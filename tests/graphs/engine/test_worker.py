"""What the builder is told: its settings, seen by a stand-in of TensorRT's module that notes every call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest

from corral.graphs.engine import build, worker
from corral.graphs.engine.build import EngineSettings, build_engine
from corral.graphs.engine.profiles import Profile
from corral.graphs.engine.tensorrt_module import TensorRT
from corral.graphs.engine.worker import EngineJob
from corral.spec.errors import CheckFailed
from corral.spec.tensorrt_flavors import FLAVORS


@pytest.fixture
def trt() -> MagicMock:
    module = MagicMock(ILogger=type("ILogger", (), {}), IStreamWriter=type("IStreamWriter", (), {}))
    module.__version__ = "11.0"
    module.Builder().create_builder_config().get_timing_cache().serialize.return_value = b"measured"
    module.Builder().create_network().num_inputs = module.Builder().create_network().num_outputs = 0
    return module


@pytest.fixture
def job(tmp_path: Path) -> EngineJob:
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "g.onnx")
    graph, out = str(tmp_path / "g.onnx"), str(tmp_path / "g.engine")
    return EngineJob(module="tensorrt", graph=graph, out=out, capabilities=("8.9",), profiles=())


def config_of(trt: MagicMock) -> Any:
    return trt.Builder().create_builder_config()


def build_with(trt: MagicMock, job: EngineJob, **changes: Any) -> None:
    assert not worker._build(TensorRT(trt, FLAVORS[job.module]), dataclasses.replace(job, **changes)).error


def test_weight_streaming_is_a_flag_of_the_builder(trt: MagicMock, job: EngineJob) -> None:
    build_with(trt, job)
    config_of(trt).set_flag.assert_not_called()
    build_with(trt, job, weight_streaming=True)
    config_of(trt).set_flag.assert_called_once_with(trt.BuilderFlag.WEIGHT_STREAMING)


def test_what_a_builder_measured_is_given_to_the_next_build(trt: MagicMock, job: EngineJob, tmp_path: Path) -> None:
    config, kept = config_of(trt), tmp_path / "cache" / "tensorrt"
    build_with(trt, job)
    config.set_timing_cache.assert_not_called()
    for expected in (b"", b"measured"):
        build_with(trt, job, timing_cache=str(kept))
        config.create_timing_cache.assert_called_with(expected)
        config.set_timing_cache.assert_called_with(config.create_timing_cache(), ignore_mismatch=False)
    assert [path.name for path in kept.parent.iterdir()] == ["tensorrt"]


def test_a_cache_of_another_version_is_replaced_by_an_empty_one(trt: MagicMock, job: EngineJob, tmp_path: Path) -> None:
    config, kept = config_of(trt), tmp_path / "tensorrt"
    kept.write_bytes(b"of another version")
    config.set_timing_cache.side_effect = [False, True]
    build_with(trt, job, timing_cache=str(kept))
    assert [call.args for call in config.create_timing_cache.call_args_list] == [(b"of another version",), (b"",)]
    assert kept.read_bytes() == b"measured"


def test_plugins_are_registered_before_the_graph_is_parsed(
    monkeypatch: pytest.MonkeyPatch, trt: MagicMock, job: EngineJob
) -> None:
    order: list[Any] = []

    def parser(*given: Any) -> MagicMock:
        order.append("parse")
        return MagicMock()

    monkeypatch.setattr(worker, "register_plugins", lambda *given: order.append(given))
    trt.OnnxParser.side_effect = parser
    build_with(trt, job)
    assert order == ["parse"]
    build_with(trt, job, plugins="compute_90")
    assert order[1:] == [(trt, "compute_90"), "parse"]


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_only_a_builder_that_times_its_kernels_gets_a_cache(
    monkeypatch: pytest.MonkeyPatch, job: EngineJob, tmp_path: Path, module: str
) -> None:
    """In the user's cache directory, outside every bundle."""
    seen: list[EngineJob] = []

    def run(job: EngineJob, directory: Path) -> Any:
        seen.append(job)
        raise CheckFailed("enough")

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = EngineSettings(module=module, capabilities=("8.9",), profiles=(), weight_streaming=True)
    with pytest.raises(CheckFailed, match="enough"):
        build_engine(Path(job.graph), "g.engine", settings)
    timed = str(tmp_path / "corral" / "timing" / "tensorrt")
    assert seen[0].timing_cache == (timed if module == "tensorrt" else "")
    assert seen[0].weight_streaming


def test_the_builder_takes_the_flag_and_keeps_the_weights(tmp_path: Path) -> None:
    """Built for real: the flag shows in the engine's bytes, and in none of its weights."""
    pytest.importorskip("tensorrt_rtx")
    weight = np.random.default_rng(0).standard_normal((512, 1024), np.float32)
    text = '<ir_version: 10, opset_import: ["": 24]> g (float[batch, 512] x) => (float[batch, 1024] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="w.bin")
    settings = EngineSettings(
        module="tensorrt_rtx",
        capabilities=("8.9",),
        profiles=(Profile(name="any", axes={"batch": (1, 2, 4)}),),
    )
    engines = [
        build_engine(tmp_path / "g.onnx", f"{flag}.engine", dataclasses.replace(settings, weight_streaming=flag))
        for flag in (False, True)
    ]
    assert engines[0].path.read_bytes() != engines[1].path.read_bytes()
    assert engines[0].schedules[0].weights == engines[1].schedules[0].weights
