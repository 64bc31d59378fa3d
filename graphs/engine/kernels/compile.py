"""NVRTC: a kernel's source -> machine code (cubin) or PTX for one compute capability, with what it uses of the GPU.

No GPU and no driver are needed. The same source, macros and NVRTC version give the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corral.graphs.engine.kernels.launch import Kernel
from corral.spec.errors import EnvironmentProblem

SOURCES = Path(__file__).parent
# Compute capabilities that the kernels are compiled for: A100, L40S and RTX 4090, H100, B200, RTX 5090. An "a" stands for
# code that runs on that capability only; others also run on later ones of the same first digit.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
REMEDY = 'Install it with `pip install "corral[kernels]"`.'


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a thread or a block of a kernel uses, as ptxas reports it. Stack and spills cost memory traffic."""

    registers: int  # a thread
    shared_bytes: int  # a block
    stack_bytes: int  # a thread
    spill_store_bytes: int  # a thread
    spill_load_bytes: int  # a thread


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Machine code or PTX with its entry point. `resources` is None for PTX, which no assembler has seen yet."""

    entry: str
    image: bytes
    resources: Resources | None


def compile_kernel(kernel: Kernel, architecture: str, form: Literal["cubin", "ptx"] = "cubin") -> Compiled:
    """Compile for `sm_80` and so on (cubin) or `compute_80` and so on (PTX; the driver compiles it when it is loaded).

    Raises EnvironmentProblem where a package is missing, or where this NVRTC does not take the source or architecture.
    """
    nvrtc = _nvrtc()
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"-I{cuda_headers()}",
        f"-I{SOURCES}",
        *(f"-D{macro}={value}" for macro, value in kernel.macros),
        *(("-Xptxas", "-v") if form == "cubin" else ()),
    ]
    encoded = [option.encode() for option in options]
    source = (SOURCES / kernel.source).read_bytes()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, kernel.source.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode().strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EnvironmentProblem(
                f"NVRTC {nvrtc_version()} did not compile {kernel.name} for {architecture} ({status.name}): {log} "
                f'The kernels were written for NVRTC 13.0; `pip install "corral[kernels]"` brings one that fits.'
            )
        size, get = {
            "cubin": (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN),
            "ptx": (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX),
        }[form]
        image = _read(nvrtc, program, size, get)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(entry=kernel.entry, image=image, resources=parse_resources(log) if form == "cubin" else None)


def parse_resources(log: str) -> Resources:
    """What `ptxas -v` says about the one kernel in its log. Raises EnvironmentProblem where it says it in other words."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if not frame or not used:
        raise EnvironmentProblem(
            f"no registers and stack in what ptxas reported; expected NVRTC 13.0's words, got: {log}"
        )
    shared = re.search(r"(\d+) bytes smem", log)
    stack, stores, loads = map(int, frame.groups())
    return Resources(
        registers=int(used[1]),
        shared_bytes=int(shared[1]) if shared else 0,
        stack_bytes=stack,
        spill_store_bytes=stores,
        spill_load_bytes=loads,
    )


def nvrtc_version() -> str:
    """Major and minor version of the NVRTC that compiles here. Raises EnvironmentProblem where there is none."""
    nvrtc = _nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    _checked(nvrtc, (status,))
    return f"{major}.{minor}"


def cuda_headers() -> Path:
    """The folder that has cuda_fp16.h. Raises EnvironmentProblem where the package is missing."""
    from importlib import metadata

    package = "nvidia-cuda-runtime"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem(f"the Python package {package}, with CUDA's headers, is missing. {REMEDY}") from None
    for file in files:
        if file.name == "cuda_fp16.h":
            return Path(str(file.locate())).parent
    raise EnvironmentProblem(f"the Python package {package} has no cuda_fp16.h. {REMEDY}")


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except ImportError:
        raise EnvironmentProblem(f"the Python package cuda-bindings is missing. {REMEDY}") from None
    except RuntimeError as error:  # the bindings look for the library when it is first called
        raise EnvironmentProblem(f"NVRTC's library cannot be loaded ({error}). {REMEDY}") from None
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EnvironmentProblem(f"NVRTC answered {status.name}. {REMEDY}")
    return values[0] if values else None


def _read(nvrtc: Any, program: Any, size: Any, get: Any) -> bytes:
    content = bytearray(_checked(nvrtc, size(program)))
    _checked(nvrtc, get(program, content))
    return bytes(content)
