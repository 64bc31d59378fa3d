"""A process that builds one engine: `python -m corral.graphs.engine.worker` reads an EngineJob, prints what it built.

A process of its own, because a builder's memory is only given back when it ends, and because a builder orders some of
what it writes by addresses: with the same addresses in every run, the same graph gives the same bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corral.graphs.engine.mapped_weights import MappedWeights
from corral.graphs.engine.plugins.moe import register_plugins
from corral.graphs.engine.tensorrt_module import TensorRT, load_tensorrt
from corral.graphs.engine.timing_cache import keep_timing_cache, read_timing_cache

ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
Shapes = dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]  # input -> least, likely, largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineJob:
    """What to build: paths relative to the working directory, profiles as shapes of the inputs that vary."""

    module: str
    graph: str
    out: str
    capabilities: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    weight_streaming: bool = False
    timing_cache: str = ""  # a file, for a module that keeps one
    plugins: str = ""  # where the graph calls corral's: what they are compiled for, as in "compute_90"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a worker says at its end. `error` is the builder's own words where there is no engine."""

    built_with: str
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()
    peak_memory_bytes: int = 0
    error: str = ""


def main() -> None:
    """Build the job on standard input; the last line of standard output is a Built."""
    _fix_addresses()
    job = EngineJob(**json.load(sys.stdin))
    print(json.dumps(dataclasses.asdict(_build(load_tensorrt(job.module), job))))  # noqa: T201


def _fix_addresses() -> None:
    """Start this process again without address randomization, where the system lets it (some containers do not)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    now = libc.personality(0xFFFFFFFF)
    if now == -1 or now & ADDR_NO_RANDOMIZE or libc.personality(now | ADDR_NO_RANDOMIZE) == -1:
        return
    if libc.personality(0xFFFFFFFF) & ADDR_NO_RANDOMIZE:
        os.execv(sys.executable, sys.orig_argv)


def _build(tensorrt: TensorRT, job: EngineJob) -> Built:
    trt: Any = tensorrt.module
    words: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU the builder looks for one and says so each time something else fails.
            if severity in (self.Severity.ERROR, self.Severity.INTERNAL_ERROR) and "catchCudaError" not in message:
                words.append(message)

    if job.plugins:
        register_plugins(trt, job.plugins)
    builder = trt.Builder(Log())
    builder.max_threads = 1  # with more, their order decides on bytes
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    weights = MappedWeights(Path(job.graph))
    if not weights.parse(parser):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        refused = [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
        return Built(built_with=tensorrt.name, error="; ".join(refused or words))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the engine would not name its layers
    if job.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if tensorrt.flavor.named_capabilities:
        config.num_compute_capabilities = len(job.capabilities)
        for i, capability in enumerate(job.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), i)
    if job.timing_cache:
        read_timing_cache(config, Path(job.timing_cache))
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    with open(job.out, "wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                return file.write(data)

        with weights.giving_back():
            done = builder.build_serialized_network_to_stream(network, config, Writer())
        os.fsync(file.fileno())  # its sidecar, which says that it is finished, must not outlive it
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not done:
        return Built(built_with=tensorrt.name, peak_memory_bytes=peak, error="; ".join(words) or "no reason given")
    if job.timing_cache:
        keep_timing_cache(config, Path(job.timing_cache))
    return Built(
        built_with=tensorrt.name,
        inputs=tuple(_describe(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_describe(network.get_output(i)) for i in range(network.num_outputs)),
        peak_memory_bytes=peak,
    )


def _describe(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


if __name__ == "__main__":
    main()
