"""One graph -> one engine file, and the checks that it is what was asked for.

The weights are read by the builder itself, mapped from the shards beside the graph. The engine is written under a
temporary name; only one that passes the checks gets its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corral.graphs.engine.fp8_products import check_fp8_products, fp8_products
from corral.graphs.engine.kernels.compile import nvrtc_version
from corral.graphs.engine.plugins.moe import NAMESPACE
from corral.graphs.engine.profiles import Profile
from corral.graphs.engine.schedule import Kernel, Operand, Schedule, read_schedules, weight_bytes
from corral.graphs.engine.worker import Built, EngineJob
from corral.spec.errors import CheckFailed, EnvironmentProblem, InputError
from corral.spec.machine import usable_memory
from corral.spec.tensorrt_flavors import FLAVORS, Flavor
from corral.spec.user_cache import user_cache

PARTIAL = ".partial"
# How far an engine's weights may be from what their bits say: a share of them, and bytes that lie around any weights.
TOLERANCE, AROUND_BYTES = 0.15, 1 << 20
# Peak memory of a build, measured: up to three times the weights, and the builder itself.
MEMORY_FACTOR, MEMORY_BYTES = 3, 1 << 30
COPIES = ("float", "half", "bfloat16", "fp8_e4m3")  # what a dequantized weight is written as
# ONNX's types -> the schedule's
QUANTIZED = {"INT4": "int4", "INT8": "int8", "FLOAT8E4M3FN": "fp8_e4m3", "FLOAT4E2M1": "fp4_e2m1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All but the graph and its weights that decides an engine's bytes."""

    module: str
    capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    weight_streaming: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A finished engine: its file, what the builder said, and what its schedules say, one a profile."""

    path: Path
    built: Built
    schedules: tuple[Schedule, ...]
    weight_bytes: int  # in the engine
    expected_bytes: int  # of the weights' bits


@dataclasses.dataclass(frozen=True)
class GraphFacts:
    """What a build must know of its graph."""

    inputs: dict[str, tuple[int | str, ...]]  # with their shapes
    stored: Counter[str]  # bytes of weights by ONNX type
    fp8_products: tuple[str, ...]
    plugins: tuple[str, ...]  # called


def build_engine(graph: Path, name: str, settings: EngineSettings) -> Engine:
    """Build the engine `name` of an ONNX file, beside it.

    Raises InputError where the graph calls plugins and the module takes none, CheckFailed where the builder refuses the
    graph or stores a quantized weight as float, EnvironmentProblem where memory does not suffice, the builder is killed
    or what compiles plugins is missing.
    """
    flavor = FLAVORS[settings.module]
    facts = _read_graph(graph)
    if facts.plugins:
        _check_plugins(graph, flavor, facts.plugins)
    expected = sum(facts.stored.values())
    _check_memory(graph, expected)
    out, partial = graph.with_name(name), graph.with_name(name + PARTIAL)
    job = EngineJob(
        module=settings.module,
        graph=graph.name,
        out=partial.name,
        capabilities=settings.capabilities,
        profiles=tuple(
            {
                name: profile.shapes(shape)
                for name, shape in facts.inputs.items()
                if any(isinstance(d, str) for d in shape)
            }
            for profile in settings.profiles
        ),
        weight_streaming=settings.weight_streaming,
        timing_cache=str(user_cache() / "timing" / flavor.module) if flavor.timing_cache else "",
        plugins=f"compute_{settings.capabilities[0].replace('.', '')}" if facts.plugins else "",
    )
    try:
        built = _run(job, graph.parent)
        text = flavor.text_schedule
        schedules = tuple(read_schedules(partial)) if text else ()
        found = weight_bytes(partial) if text else partial.stat().st_size
        _check_weights(out, schedules, facts.stored, found, expected, len(settings.profiles))
        for schedule in schedules:
            check_fp8_products(out, schedule, facts.fp8_products)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return Engine(path=out, built=built, schedules=schedules, weight_bytes=found, expected_bytes=expected)


def _read_graph(path: Path) -> GraphFacts:
    """Reads no weight."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    inputs: dict[str, tuple[int | str, ...]] = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) for value in graph.input
    }
    stored: Counter[str] = Counter()
    for tensor in graph.initializer:
        length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
        stored[onnx.TensorProto.DataType.Name(tensor.data_type)] += length
    plugins = dict.fromkeys(node.op_type for node in graph.node if node.domain == NAMESPACE)
    return GraphFacts(inputs, stored, fp8_products(graph), tuple(plugins))


def _check_plugins(graph: Path, flavor: Flavor, plugins: Sequence[str]) -> None:
    if not flavor.plugins:
        raise InputError(
            f"{graph} calls corral's own kernels ({', '.join(plugins)}), and {flavor.module} takes no kernels of others. "
            "Compile the checkpoint with --target tensorrt-rtx; or for target tensorrt with --expert-tiles 1, which does "
            "without them."
        )
    nvrtc_version()  # says what to install where plugins cannot be compiled


def _check_memory(graph: Path, expected: int) -> None:
    needed, free = MEMORY_FACTOR * expected + MEMORY_BYTES, usable_memory()
    if needed > free:
        raise EnvironmentProblem(
            f"building the engine of {graph} takes up to {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free. Compile in stages (--stage-gb 4, say): an engine each, one built after the other. Or build on a larger "
            "machine."
        )


def _run(job: EngineJob, directory: Path) -> Built:
    # The least environment: what is in it moves the addresses that a builder's order depends on.
    kept = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "corral.graphs.engine.worker"],
        input=json.dumps(dataclasses.asdict(job)),
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGKILL:
        raise EnvironmentProblem(
            f"the builder of {job.graph} was killed, most likely because memory ran out. Free some, or build on a "
            "larger machine."
        )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CheckFailed(f"{job.module} failed on {directory / job.graph}: {last} Please report this graph.")
    built = Built(**json.loads(lines[-1]))
    if built.error:
        raise CheckFailed(
            f"{built.built_with} builds no engine of {directory / job.graph} for compute capability "
            f"{', '.join(job.capabilities)}: {built.error}"
        )
    return built


def _check_weights(
    out: Path, schedules: Sequence[Schedule], stored: Counter[str], found: int, expected: int, profiles: int
) -> None:
    """Raise CheckFailed where a weight became another type: silent fallback is the commonest lie in this field.

    By type where the schedule says it. By the file's size in any case; profiles whose kernels want a dense matrix in
    two different orders make the builder store it twice, so that each profile's weights are allowed for once.
    """
    most = (1 + TOLERANCE) * expected * (profiles if schedules else 1) + AROUND_BYTES
    if not (1 - TOLERANCE) * expected <= found <= most:
        raise CheckFailed(
            f"{out.name} holds {found / 1e6:.1f} MB of weights, expected {expected / 1e6:.1f} MB within "
            f"{TOLERANCE:.0%}: a weight did not stay as it was stored. The engine is not kept."
        )
    for schedule in schedules:
        rows = [("all", sum(schedule.weights.values()), expected)]
        rows += [(kind, schedule.weights.get(kind, 0), stored[onnx_type]) for onnx_type, kind in QUANTIZED.items()]
        for kind, have, want in rows:
            if abs(have - want) > TOLERANCE * want + (AROUND_BYTES if kind == "all" else 0):
                raise CheckFailed(
                    f"a profile of {out.name} holds {have / 1e6:.1f} MB of {kind} weights, expected "
                    f"{want / 1e6:.1f} MB within {TOLERANCE:.0%}: some became another type in the builder. The engine "
                    "is not kept."
                )


def sidecar(engine: Engine, graph: str, settings: EngineSettings) -> dict[str, Any]:
    """What is known of an engine's inside, as JSON: it cannot be opened where there is no GPU."""
    return {
        "built_with": engine.built.built_with,
        "graph": graph,
        "capabilities": list(settings.capabilities),
        "bytes": engine.path.stat().st_size,
        "weight_bytes": engine.weight_bytes,
        "expected_weight_bytes": engine.expected_bytes,
        "inputs": list(engine.built.inputs),
        "outputs": list(engine.built.outputs),
        "profiles": [
            {
                "name": profile.name,
                "axes": {axis: list(sizes) for axis, sizes in profile.axes.items()},
                **(_schedule(engine.schedules[i]) if len(engine.schedules) == len(settings.profiles) else {}),
            }
            for i, profile in enumerate(settings.profiles)
        ],
    }


def _schedule(schedule: Schedule) -> dict[str, Any]:
    return {
        "weights": dict(schedule.weights),
        "scratch_bytes": schedule.scratch_bytes,
        "kernels": [_kernel(kernel) for kernel in schedule.kernels],
        "unfused_weights": [
            {
                "kernel": kernel.name,
                "layers": [layer for layer in kernel.layers if layer.endswith("DequantizeLinear")],
                "writes": [_operand(operand) for operand in kernel.writes if operand.type in COPIES],
            }
            for kernel in schedule.unfused_weights()
        ],
    }


def _kernel(kernel: Kernel) -> dict[str, Any]:
    operands = {"reads": [_operand(o) for o in kernel.reads], "writes": [_operand(o) for o in kernel.writes]}
    return dataclasses.asdict(kernel) | operands


def _operand(operand: Operand) -> dict[str, Any]:
    return dataclasses.asdict(operand) | {"known_bytes": operand.known_bytes}
