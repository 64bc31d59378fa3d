"""What keeps an engine from running, each with what to do; and the real modules where they can be asked without a GPU."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.runtime import LLM
from corral.runtime.gpu import cuda_device as cuda_device_module
from corral.runtime.gpu import tensorrt_engine as tensorrt_engine_module
from corral.runtime.gpu.tensorrt_engine import INVALID, TensorRTEngine
from corral.runtime.gpu.tensorrt_session import TensorRTSession
from corral.spec.bundle import Bundle
from corral.spec.errors import CorralError, EnvironmentProblem, InputError

EngineBundle = Callable[..., Bundle]
Install = Callable[..., Any]


@pytest.fixture
def bundle(engine_bundle: EngineBundle, tmp_path: Path) -> Bundle:
    """A bundle of one's own."""
    shutil.copytree(engine_bundle("scout").directory, tmp_path / "bundle")
    return Bundle(tmp_path / "bundle", engine_bundle("scout").manifest)


def with_engine(bundle: Bundle, **changes: Any) -> Bundle:
    (engine,) = bundle.manifest.engines
    manifest = dataclasses.replace(bundle.manifest, engines=(dataclasses.replace(engine, **changes),))
    return Bundle(bundle.directory, manifest)


def refusal(bundle: Bundle, device: Any, kind: type[CorralError]) -> str:
    with pytest.raises(kind) as caught:
        TensorRTSession(bundle, open_device=lambda: device)
    assert caught.type is kind
    return str(caught.value)


def test_an_engine_of_another_version(bundle: Bundle, install: Install) -> None:
    said = refusal(bundle, install(version="1.6.0.45"), EnvironmentProblem)
    assert "was built with tensorrt_rtx 1.7.1.116, and tensorrt_rtx is 1.6.0.45 here" in said
    assert 'Run `pip install "tensorrt-rtx-cu13==1.7.1.116"`, or build the engine again with `corral build`.' in said


def test_an_engine_of_a_module_that_is_not_here(
    bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = install()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = refusal(with_engine(bundle, built_with="tensorrt 11.0.0"), device, EnvironmentProblem)
    assert 'Run `pip install "tensorrt==11.0.0"`.' in said
    said = refusal(with_engine(bundle, built_with="another 1.0"), device, InputError)
    assert "this corral runs engines of tensorrt_rtx and tensorrt" in said


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        ("8.6", "and a stand-in has 8.6. Run `corral build {} --gpu 8.6`; it adds one beside those."),
        ("9.0", "Building one will not help: target tensorrt-rtx builds no engines for compute capability 9.0"),
    ],
)
def test_an_engine_for_another_gpu(bundle: Bundle, install: Install, capability: str, says: str) -> None:
    said = refusal(bundle, install(capability=capability), InputError)
    assert "holds engines of decoder.onnx for compute capability 8.9" in said
    assert says.format(bundle.directory) in said


def test_too_little_device_memory(bundle: Bundle, install: Install) -> None:
    said = refusal(bundle, install(free=1000), EnvironmentProblem)
    assert "of a stand-in's memory (0.0 GB of weights, 0.0 GB of caches a sequence), and 0.0 GB are free" in said
    assert "a smaller --max-context" in said


@pytest.mark.parametrize("name", INVALID)
def test_what_an_engine_says_of_itself(bundle: Bundle, install: Install, name: str) -> None:
    flags = int(getattr(pytest.importorskip("tensorrt_rtx").EngineInvalidityDiagnostics, name))
    assert INVALID[name] in refusal(bundle, install(flags=flags), InputError)


def test_an_engine_that_is_none(bundle: Bundle, install: Install) -> None:
    bundle.path(bundle.manifest.engines[0].path).write_bytes(b"foreign")
    said = refusal(bundle, install(), InputError)
    assert "does not open" in said and "kEXPECTED_MAGIC_TAG failed. Build it again" in said
    bundle.path(bundle.manifest.engines[0].path).write_bytes(b"")
    assert "is empty" in refusal(bundle, install(), InputError)


def test_a_truncated_engine_is_found_when_the_bundle_is_opened(bundle: Bundle) -> None:
    path = bundle.path(bundle.manifest.engines[0].path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"decoder\.sm89\.engine"):
        LLM(bundle.directory)


def test_an_engine_that_copies_its_caches(bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    device = install()
    monkeypatch.setattr(TensorRTEngine, "aliased_input", lambda self, name: None)
    assert "does not update past_key.0 in place" in refusal(bundle, device, InputError)


def test_an_engine_with_other_caches(bundle: Bundle, install: Install) -> None:
    kv = tuple(dataclasses.replace(layout, dtype="float32") for layout in bundle.manifest.kv)
    other = Bundle(bundle.directory, dataclasses.replace(bundle.manifest, kv=kv))
    assert "past_key.0 is float16, expected float32" in refusal(other, install(), InputError)


def test_an_engine_of_another_stage(bundle: Bundle, install: Install) -> None:
    layers = bundle.manifest.model.layers[:-1]
    model = dataclasses.replace(bundle.manifest.model, layers=layers)
    graph = dataclasses.replace(bundle.manifest.graphs[0], end_layer=len(layers))
    other = dataclasses.replace(bundle.manifest, model=model, graphs=(graph,))
    assert "has other inputs than its manifest implies" in refusal(
        Bundle(bundle.directory, other), install(), InputError
    )


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_real_thing_says_so(bundle: Bundle) -> None:
    with pytest.raises(EnvironmentProblem, match=r"CUDA finds no NVIDIA GPU .*--target cpu"):
        LLM(bundle.directory)


def test_without_cuda_bindings_the_pip_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EnvironmentProblem, match=r'`pip install "cuda-bindings>=13\.0,<13\.1"`'):
        LLM(bundle.directory)


@pytest.mark.usefixtures("no_gpu")
def test_the_real_module_knows_a_foreign_file_even_without_a_gpu(bundle: Bundle, install: Install) -> None:
    pytest.importorskip("tensorrt_rtx")
    device = install()
    del sys.modules["tensorrt_rtx"]
    path = bundle.path(bundle.manifest.engines[0].path)
    path.write_bytes(b"foreign")
    with pytest.raises(InputError, match="it is no engine, or a damaged one: build it again"):
        TensorRTEngine(path, bundle.manifest.engines[0], device)


def test_what_is_called_in_cuda_bindings_is_there() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    source = inspect.getsource(cuda_device_module)
    used = set(re.findall(r'_call\(\s*"(cuda\w+)"|_cuda\.(cuda\w+)', source))
    names = {name for pair in used for name in pair if name}
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyKind"} <= names
    assert [name for name in sorted(names) if not hasattr(runtime, name)] == []
    for kind, members in (
        (runtime.cudaError_t, (*cuda_device_module.NO_GPU, cuda_device_module.OUT_OF_MEMORY)),
        (runtime.cudaMemcpyKind, ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice")),
        (runtime.cudaStreamCaptureMode, ("cudaStreamCaptureModeThreadLocal",)),
        (runtime.cudaDeviceAttr, ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")),
    ):
        assert all(hasattr(kind, member) for member in members)


def test_what_is_called_in_tensorrt_is_there_and_the_stand_in_has_no_more(install: Install) -> None:
    """Of both modules' classes as they are installed; TensorRT proper cannot be imported here, so its names are not."""
    trt = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(tensorrt_engine_module)
    for kind, prefix in (
        (trt.ICudaEngine, r"_engine\."),
        (trt.IExecutionContext, r"(?:context|_contexts\[profile\])\."),
        (trt.Runtime, r"_runtime\."),
        (trt.IRuntimeConfig, r"config\."),
        (trt, r"(?:self\._trt|\btrt)\."),
    ):
        names = set(re.findall(prefix + r"(\w+)", source)) - {"__version__"}
        assert names, prefix
        assert [name for name in sorted(names) if not hasattr(kind, name)] == []
    device = install()
    fake = sys.modules["tensorrt_rtx"]
    assert {name for name in vars(fake) if not name.startswith("_")} <= set(dir(trt))
    for name, value in fake.EngineInvalidityDiagnostics.__members__.items():
        assert int(getattr(trt.EngineInvalidityDiagnostics, name)) == value
    assert trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert device.stream
