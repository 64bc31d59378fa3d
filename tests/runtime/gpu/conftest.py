"""Stand-ins for a GPU and for `tensorrt_rtx`: memory of this process, and the builder's own graph in ONNX Runtime.

They hold a session to what the real ones would: shapes within a profile, contexts with their profile set, addresses
within memory that is still allocated, caches bound in place, recorded work that keeps the shapes and addresses of its
recording. An "engine" is a file with a few words of JSON: which graph, and its profiles.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shutil
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from corral.graphs import compile
from corral.graphs.engine.profiles import profiles_for
from corral.graphs.hash_files import hash_files
from corral.runtime.gpu.cuda_device import Buffer
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.manifest import MANIFEST_NAME, EngineRecord
from corral.spec.recipe import Recipe

ONNX_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class FakeDevice:
    """Host memory under addresses. `log` is what was done: "run decode", "record", "launch"."""

    name, stream = "a stand-in", 7

    def __init__(self, capability: str = "8.9", free: int = 1 << 34) -> None:
        self.capability, self._free = capability, free
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray] = {}
        self._recording: list[Callable[[], None]] | None = None

    def free_memory(self) -> int:
        return self._free

    def allocate(self, count: int) -> Buffer:
        block = np.zeros(count, np.uint8)
        address = block.ctypes.data
        self.memory[address] = block
        memory = weakref.ref(self)

        def free(address: int) -> None:
            if (device := memory()) is not None:
                del device.memory[address]

        return Buffer(address, count, free)

    def at(self, address: int, count: int) -> np.ndarray:
        """The bytes there, which must lie within one allocation that still lives."""
        for start, block in self.memory.items():
            if start <= address and address + count <= start + block.nbytes:
                return block[address - start : address - start + count]
        raise AssertionError(f"{count} bytes at {address:#x} are not allocated")

    def zero(self, address: int, count: int) -> None:
        self.at(address, count)[:] = 0

    def copy(self, target: int, source: int, count: int) -> None:
        self.at(target, count)[:] = self.at(source, count)

    def upload(self, target: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.at(target, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, array: np.ndarray, source: int) -> None:
        assert array.flags.c_contiguous
        array.reshape(-1).view(np.uint8)[:] = self.at(source, array.nbytes)

    def wait(self) -> None:
        pass

    def put(self, work: Callable[[], None]) -> None:
        """Work on the stream: done now, or noted while recording."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def record(self, work: Callable[[], None]) -> FakeRecording:
        self.log.append("record")
        self._recording = []
        try:
            work()
            return FakeRecording(self, self._recording)
        finally:
            self._recording = None


class FakeRecording:
    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self._device, self._work = device, work

    def launch(self) -> None:
        self._device.log.append("launch")
        for one in self._work:
            one()


class FakeEngine:
    """The graph of an engine, in ONNX Runtime."""

    def __init__(self, device: FakeDevice, about: dict[str, Any]) -> None:
        self.device = device
        self.profiles = list(about["profiles"].items())
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = onnxruntime.InferenceSession(about["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.contexts = 0
        self.in_place = True
        self.streamable_weights_size = about.get("streamable", 0)
        self.budget: int | None = None
        self.most_budget = about.get("most_budget", self.streamable_weights_size)

    @property
    def weight_streaming_budget_v2(self) -> int:
        assert self.budget is not None
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert self.streamable_weights_size, "its weights do not stream"
        assert not self.contexts, "set before there is a context"
        self.budget = min(budget, self.most_budget)

    num_io_tensors = property(lambda self: len(self.names))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=ONNX_TYPES[(self.inputs | self.outputs)[name].type])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        axes = self.profiles[index][1]
        shape = [d if isinstance(d, int) else axes[d] for d in self.inputs[name].shape]
        return [[d if isinstance(d, int) else d[which] for d in shape] for which in range(3)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past") if name.startswith("present") and self.in_place else None

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, config: Any) -> FakeContext:
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert (self.budget is None) == (not self.streamable_weights_size), "TensorRT would keep no weight"
        self.contexts += 1
        return FakeContext(self)


class FakeContext:
    """Runs the graph on what lies at the addresses that were set."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._device = engine, engine.device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._device.stream
        self._profile = profile
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return stream == self._device.stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        assert all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True)), f"{name} {shape}"
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream and self._profile is not None
        engine, shapes, addresses = self._engine, dict(self._shapes), dict(self._addresses)
        assert shapes.keys() == engine.inputs.keys() and addresses.keys() == set(engine.names)
        for name in engine.outputs:
            if name.startswith("present"):
                assert addresses[name] == addresses[name.replace("present", "past")]
        profile = engine.profiles[self._profile][0]

        def run() -> None:
            self._device.log.append(f"run {profile}")
            feeds = {name: self._tensor(name, addresses[name], shape) for name, shape in shapes.items()}
            results = engine.session.run(list(engine.outputs), feeds)
            for (name, value), result in zip(engine.outputs.items(), results, strict=True):
                dtype = NUMPY[ONNX_TYPES[value.type]]
                self._device.upload(addresses[name], np.ascontiguousarray(result, dtype))

        self._device.put(run)
        return True

    def _tensor(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(NUMPY[ONNX_TYPES[self._engine.inputs[name].type]])
        return self._device.at(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape).copy()


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class ILogger:
    Severity = Severity


class EngineValidity(enum.Enum):
    VALID, INVALID = 0, 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    """As in tensorrt_rtx 1.7.1; a test compares."""

    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


def fake_module(device: FakeDevice, *, version: str = "1.7.1.116", flags: int = 0) -> types.ModuleType:
    """What `import tensorrt_rtx` gives; `flags` are found wrong with every engine."""

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger: Any = logger

        def get_engine_validity(self, plan: Any) -> tuple[EngineValidity, int]:
            return (EngineValidity.INVALID if flags else EngineValidity.VALID), flags

        def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
            try:
                return FakeEngine(device, json.loads(bytes(plan)))
            except ValueError:
                self._logger.log(
                    Severity.ERROR, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed"
                )
                return None

    module: Any = types.ModuleType("tensorrt_rtx")
    module.__version__ = version
    module.ILogger, module.Runtime, module.TensorIOMode = ILogger, Runtime, TensorIOMode
    module.EngineValidity, module.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(ON_PROFILE_CHANGE="profile")
    module.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    return module


EngineBundle = Callable[..., Bundle]
Install = Callable[..., FakeDevice]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(capability="8.9", free=..., version=..., flags=...)` -> a device, with `tensorrt_rtx` running on it."""

    def make(*, version: str = "1.7.1.116", flags: int = 0, **about: Any) -> FakeDevice:
        device = FakeDevice(**about)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_module(device, version=version, flags=flags))
        return device

    return make


@pytest.fixture
def no_gpu() -> None:
    """Skips where there is a GPU."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")


@pytest.fixture(scope="session")
def engine_bundle(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> EngineBundle:
    """`engine_bundle("scout", weights="fp16", stages=1, tokens=16, rows=1)` -> a bundle whose engines are stand-ins.

    `tokens` and `rows` of its prefill profile; 64 tokens of context, 3 sequences. Made once; do not write into it.
    Several stages are of portable graphs (which cut more easily), with float32 caches.
    """
    lowered: dict[tuple[str, str, int], Path] = {}
    made: dict[tuple[Any, ...], Bundle] = {}

    def make(form: str, *, weights: str = "fp16", stages: int = 1, tokens: int = 16, rows: int = 1) -> Bundle:
        key = (form, weights, stages)
        recipe = Recipe(target="tensorrt-rtx", weights=weights, group_size=32, max_context=64, max_batch=3)
        if key not in lowered:
            lowered[key] = tmp_path_factory.mktemp("lowered") / "bundle"
            graphs = recipe if stages == 1 else Recipe(target="portable", weights="fp32", stages=stages)
            compile(tiny_checkpoint(form), lowered[key], graphs)
        if (*key, tokens, rows) not in made:
            directory = tmp_path_factory.mktemp("engines") / "bundle"
            shutil.copytree(lowered[key], directory)
            made[*key, tokens, rows] = add_engines(directory, recipe, tokens, rows)
        return made[*key, tokens, rows]

    return make


def add_engines(directory: Path, recipe: Recipe, tokens: int, rows: int) -> Bundle:
    """Engines of stand-ins, in the manifest as `corral build` lists them."""
    manifest = open_bundle(directory).manifest
    kv = tuple(dataclasses.replace(layout, fixed_rows=layout.capacity(64)) for layout in manifest.kv)
    manifest = dataclasses.replace(manifest, recipe=recipe, kv=kv)
    decode, prefill = profiles_for(recipe, kv)
    fixed = {f"capacity_{layout.kv_class}": (layout.fixed_rows,) * 3 for layout in kv}
    more = {"tokens": (1, tokens, tokens), "rows": (1, rows, rows)}
    profiles = {"decode": {**decode.axes, **fixed}, "prefill": {**prefill.axes, **more, **fixed}}
    records = []
    for graph in manifest.graphs:
        name = f"{Path(graph.path).stem}.sm89.engine"
        (directory / name).write_text(json.dumps({"graph": str(directory / graph.path), "profiles": profiles}))
        (directory / f"{name}.json").write_text("{}")
        records.append(
            EngineRecord(
                path=name,
                sidecar=f"{name}.json",
                graph=graph.path,
                capabilities=("8.9",),
                built_with="tensorrt_rtx 1.7.1.116",
                profiles=("decode", "prefill"),
            )
        )
    files = hash_files(directory, [name for record in records for name in (record.path, record.sidecar)])
    listed = dataclasses.replace(manifest, stage="ready", engines=tuple(records), files=manifest.files + files)
    (directory / MANIFEST_NAME).write_text(listed.dumps())
    return Bundle(directory, listed)
