"""One engine file, opened: checked against what the bundle says, with an execution context for each profile.

Everything that is NVIDIA's `tensorrt` or `tensorrt_rtx` in the runtime is in this file; both have the same names for it.
**Never executed on hardware**: without a GPU no engine opens, and tests put ONNX Runtime in its place.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.runtime.gpu.cuda_device import Device
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.manifest import EngineRecord
from corral.spec.tensorrt_flavors import FLAVORS, Flavor

Shape = tuple[int, ...]

# What an engine's own check finds, by the name of its flag -> what that means and what to do.
INVALID = {
    "VERSION_MISMATCH": "another version built it: build it again with `corral build`",
    "UNSUPPORTED_CC": "it is not for this GPU: build it for this one with `corral build --gpu`",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old: install a newer one",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old: install a newer one",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory free: stop what else uses it, or take a larger one",
    "MALFORMED_ENGINE": "it is no engine, or a damaged one: build it again with `corral build`",
    "CUDA_ERROR": "CUDA does not work here: check the driver with `nvidia-smi`",
}
# TensorRT's types -> numpy's.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


@dataclass(frozen=True)
class Profile:
    """What an optimization profile takes: least and largest shape of each input."""

    index: int
    ranges: Mapping[str, tuple[Shape, Shape]]

    def takes(self, name: str, shape: Shape) -> bool:
        least, most = self.ranges[name]
        return len(shape) == len(least) and all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True))


class TensorRTEngine:
    """An engine on a device. `inputs` and `outputs` are its tensors' numpy types by name.

    `weight_budget`: bytes of weights that stay on the device, of an engine whose weights may stream to it.
    """

    def __init__(self, path: Path, record: EngineRecord, device: Device, weight_budget: int | None = None) -> None:
        self.path, self._device = path, device
        self._trt, self._flavor = load_module(record, path)
        self._log = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)  # must outlive what it opens
        self._engine = self._open()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        types = {name: self._engine.get_tensor_dtype(name).name for name in names}
        named = {name: DTYPES.get(kind, kind.lower()) for name, kind in types.items()}
        self.inputs = {name: named[name] for name in names if modes[name] == self._trt.TensorIOMode.INPUT}
        self.outputs = {name: named[name] for name in names if name not in self.inputs}
        self._streams = weight_budget is not None and self._keep_weights(weight_budget)
        self.profiles = tuple(self._profile(i) for i in range(self._engine.num_optimization_profiles))
        self._contexts = [self._context(profile.index) for profile in self.profiles]

    def aliased_input(self, output: str) -> str | None:
        """The input whose memory an output shares; None where it has its own."""
        return self._engine.get_aliased_input_tensor(output) or None

    def capturable(self, profile: int) -> bool:
        """Whether `enqueue` may be recorded by the device. Only the module that compiles kernels late may say no.

        What streams weights from the host is not recorded, whichever the module: a recording holds addresses.
        """
        if self._streams:
            return False
        if not self._flavor.runtime_cache:
            return True
        return bool(self._contexts[profile].is_stream_capturable(self._device.stream))

    def enqueue(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Put one execution on the device's stream: shapes of all inputs, addresses of all inputs and outputs."""
        context = self._contexts[profile]
        done = all(context.set_input_shape(name, shape) for name, shape in shapes.items())
        done = done and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done or not context.execute_async_v3(self._device.stream):
            raise CorralError(
                f"{self._name} failed to run {self.path}: {self._log.said()} Open the bundle with verify=True to see "
                "whether it is damaged; if it is not, please report this."
            )

    @property
    def _name(self) -> str:
        return f"{self._flavor.module} {self._trt.__version__}"

    def _open(self) -> Any:
        with self.path.open("rb") as file:
            if self.path.stat().st_size == 0:
                raise InputError(f"{self.path} is empty. Build it again with `corral build`.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                if self._flavor.engine_validity:
                    self._check_validity(plan)
                engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise InputError(
                f"{self._name} does not open {self.path}: {self._log.said()} Build it again, on this GPU where its "
                "target is tensorrt: `corral build`."
            )
        return engine

    def _check_validity(self, plan: mmap.mmap) -> None:
        validity, flags = self._runtime.get_engine_validity(plan)
        if validity != self._trt.EngineValidity.INVALID:
            return
        kinds = self._trt.EngineInvalidityDiagnostics
        found = [words for name, words in INVALID.items() if int(flags) & int(getattr(kinds, name))]
        raise InputError(f"{self._name} does not run {self.path}: {'; '.join(found) or self._log.said()}")

    def _keep_weights(self, budget: int) -> bool:
        """Set how many bytes of weights stay on the device, before any context is made; whether some must stream."""
        streamable = self._engine.streamable_weights_size
        wanted = min(budget, streamable)
        self._engine.weight_streaming_budget_v2 = wanted
        if self._engine.weight_streaming_budget_v2 != wanted:
            raise EnvironmentProblem(
                f"{self._name} does not keep {wanted / 1e9:.2f} GB of the weights of {self.path} on the GPU: "
                f"{self._log.said()} Stop what else uses the GPU, or compile without --weight-streaming."
            )
        return wanted < streamable

    def _profile(self, index: int) -> Profile:
        shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in self.inputs}
        return Profile(index, {name: (tuple(least), tuple(most)) for name, (least, _, most) in shapes.items()})

    def _context(self, profile: int) -> Any:
        trt = self._trt
        config = self._engine.create_runtime_config()
        # Scratch of this profile's size, not of the largest profile's.
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
        if self._flavor.runtime_cache:
            # What is recorded must be the last word: no better kernel that is compiled meanwhile.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise EnvironmentProblem(
                f"{self._name} has no room to run {self.path}: {self._log.said()} Stop what else uses the GPU, or take "
                "a larger one."
            )
        self._device.wait()
        return context


def load_module(record: EngineRecord, path: Path) -> tuple[Any, Flavor]:
    """The module that built an engine. Raises EnvironmentProblem unless it is here in that very version."""
    name, _, version = record.built_with.partition(" ")
    if name not in FLAVORS:
        raise InputError(
            f"{path} was built with {record.built_with!r}; this corral runs engines of {' and '.join(FLAVORS)}."
        )
    flavor = FLAVORS[name]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"{path} was built with {record.built_with}, and the Python package {name} does not import here: {error}. "
            f"Run `{flavor.pip(version)}`."
        ) from None
    if module.__version__ != version:
        raise EnvironmentProblem(
            f"{path} was built with {record.built_with}, and {name} is {module.__version__} here; a version opens only "
            f"engines of its own. Run `{flavor.pip(version)}`, or build the engine again with `corral build`."
        )
    return module, flavor


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT complains of, for the error that follows."""

        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (self.Severity.ERROR, self.Severity.INTERNAL_ERROR):
                self.words.append(message.strip())

        def said(self) -> str:
            words, self.words = self.words, []
            text = "; ".join(words) or "it gives no reason"
            return text if text.endswith(".") else f"{text}."

    return Log()
