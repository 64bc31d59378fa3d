"""A GPU as far as a session needs it: memory, copies, one stream, captured graphs. The only file that calls CUDA.

`Device` is what a session sees; tests put a device of host memory in its place. **Never executed on hardware**: names,
signatures and the way errors come back are those of `cuda-bindings` 13.0, which is installed in every test run and
answers "no driver" there.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from corral.spec.errors import CorralError, EnvironmentProblem

PIP = 'pip install "cuda-bindings>=13.0,<13.1"'
NO_GPU = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary", "cudaErrorInitializationError")
OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


class Buffer:
    """Memory on a device, freed when nobody holds it any more."""

    def __init__(self, address: int, count: int, free: Callable[[int], object]) -> None:
        self.address, self.bytes = address, count
        weakref.finalize(self, free, address)


class Recording(Protocol):
    """Work that was captured, to be launched any number of times."""

    def launch(self) -> None: ...


class Device(Protocol):
    """One GPU and one stream. Work is done in the order it is asked for; `download` waits for it."""

    name: str
    capability: str  # "8.9"
    stream: int

    def free_memory(self) -> int:
        """Bytes."""

    def allocate(self, count: int) -> Buffer:
        """`count` bytes of zeros. Raises EnvironmentProblem where there is no room."""

    def zero(self, address: int, count: int) -> None: ...

    def copy(self, target: int, source: int, count: int) -> None:
        """Within the device."""

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """A contiguous array to the device; it may change once this has returned."""

    def download(self, array: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device, after all work asked for so far."""

    def wait(self) -> None:
        """Until all work asked for is done."""

    def record(self, work: Callable[[], None]) -> Recording:
        """Capture what `work` puts on the stream, without doing it."""


class CudaDevice:
    """The first GPU that CUDA shows this process (CUDA_VISIBLE_DEVICES chooses)."""

    def __init__(self) -> None:
        self._cuda = _import_cuda()
        if not self._call("cudaGetDeviceCount"):
            raise _no_gpu("cudaErrorNoDevice")
        self._call("cudaSetDevice", 0)
        attribute = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0)
        self.name = self._call("cudaGetDeviceProperties", 0).name.decode()
        self.capability = f"{major}.{minor}"
        # TensorRT asks for another stream than the default one, which would wait for everything at each step.
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def free_memory(self) -> int:
        free, _total = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, count: int) -> Buffer:
        buffer = Buffer(int(self._call("cudaMalloc", count)), count, self._cuda.cudaFree)
        self.zero(buffer.address, count)
        return buffer

    def zero(self, address: int, count: int) -> None:
        self._call("cudaMemsetAsync", address, 0, count, self._stream)

    def copy(self, target: int, source: int, count: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, count, kind, self._stream)

    def upload(self, target: int, array: NDArray[Any]) -> None:
        # Out of ordinary memory, CUDA has copied the array to a buffer of its own before the call returns.
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: NDArray[Any], source: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, source, array.nbytes, kind, self._stream)
        self.wait()

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Recording:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self._stream)  # or the stream would take no other work
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.cudaGraphDestroy(graph)
        return _CudaGraph(self, executable)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise self._problem(name, error)
        return values[0] if len(values) == 1 else tuple(values)

    def _problem(self, name: str, error: Any) -> CorralError:
        if error.name in NO_GPU:
            return _no_gpu(error.name)
        if error.name == OUT_OF_MEMORY:
            return EnvironmentProblem(
                f"the memory of {self.name} is full. Use fewer or shorter sequences (max_batch, --max-context when "
                "compiling), a more compressed bundle, or a GPU with more memory."
            )
        _, words = self._cuda.cudaGetErrorString(error)
        return CorralError(f"{name} failed: {words.decode()} ({error.name}). Please report this.")


class _CudaGraph:
    """An executable CUDA graph, destroyed when nobody holds it any more."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device, self._executable = device, executable
        weakref.finalize(self, device._cuda.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        self._device._call("cudaGraphLaunch", self._executable, self._device._stream)


def _import_cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EnvironmentProblem(
            f"GPUs are used through the package cuda-bindings, and it does not import: {error}. Run `{PIP}`."
        ) from None


def _no_gpu(reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"CUDA finds no NVIDIA GPU that it can use on this machine ({reason}). Run on one with a GPU, its driver and "
        "access to it (`nvidia-smi` shows what is there), or compile the checkpoint with --target cpu."
    )
