"""The experts' kernels on a GPU: are they right, and which share of the memory's bandwidth do they reach?

    PYTHONPATH=src python benchmarks/kernels_moe.py [--output FILE] [SECTION ...]

NEVER EXECUTED ON HARDWARE YET: its checks have only run on the CPU, through the tests' shim.

Needs a GPU of compute capability 8.0 or newer, torch with CUDA, cuda-bindings, nvidia-cuda-nvrtc 13.0 and
nvidia-cuda-runtime. Every section runs in a process of its own, so that one that fails leaves the others; what they found
is printed as one JSON object, and written to FILE after each. A minute or two in all. Weights are random; routing is set,
and differs from run to run, so that experts come from memory and not from the L2 cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corral.graphs.engine.kernels.compile import ARCHITECTURES, compile_kernel, nvrtc_version
from corral.graphs.engine.kernels.launch import (
    DECODE,
    PREFILL,
    TILINGS,
    Kernel,
    Launch,
    MoeShape,
    Tiling,
    buffers,
    launches,
    tiling_for,
)
from corral.graphs.quantize.fragments import AXES, ORDER

Run = Callable[[Launch, dict[str, Tensor]], None]
GROUP_SIZE = 128
VARIANTS = 16  # routings that take turns while timing
REPEATS = 5


def scout(weights: str, experts: int = 16) -> MoeShape:
    """One layer of Scout (16 experts) or Maverick (128)."""
    return MoeShape(
        hidden=5120,
        width=8192,
        experts=experts,
        top_k=1,
        weights=weights,
        group_size=GROUP_SIZE if weights == "int4" else 0,
    )


# Weights and tokens -----------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """`fragments.pack_fragments`, on the device: [outputs, inputs] -> [outputs / 16, inputs / 64, elements]."""
    outputs, inputs = codes.shape
    sizes = {**AXES, "tile": outputs // 16, "step": inputs // 64}
    names = list(AXES)
    split = codes.reshape([sizes[name] for name in names]).permute([names.index(name) for name in ORDER[bits]])
    ordered = split.reshape(outputs // 16, inputs // 64, -1)
    return ordered[..., 0::2] | (ordered[..., 1::2] << 4) if bits == 4 else ordered


def pack_scales(scales: Tensor) -> Tensor:
    """`fragments.fragment_scales`, on the device."""
    return scales.reshape(-1, 2, 8, scales.shape[1]).permute(0, 3, 2, 1).contiguous()


def interleave(matrix: Tensor, gate_up: bool) -> Tensor:
    """As a plan's sources with `interleave=8` are read: runs of 8 rows of gate and of up."""
    return matrix.reshape(2, -1, 8, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape) if gate_up else matrix


@dataclass(frozen=True)
class Weights:
    """Stored tensors by their names in `buffers`, and the values of an expert as [outputs, inputs]."""

    stored: dict[str, Tensor]
    codes: dict[str, list[Tensor]]
    scales: dict[str, list[Tensor]]
    shape: MoeShape

    def values(self, name: str, expert: int) -> Tensor:
        """Dequantized as the kernels do: int4 rounded to fp16, FP8 exact in fp32."""
        codes = self.codes[name][expert]
        if self.shape.weights == "fp16":
            return codes
        scales = self.scales[name][expert]
        if self.shape.weights == "fp8":
            return codes.view(torch.float8_e4m3fn).float() * scales
        return (codes.half() - 8) * scales.repeat_interleave(self.shape.group_size, dim=1)


def random_weights(shape: MoeShape, device: str, keep: bool) -> Weights:
    """Codes of zero mean, values of about the size of 1 / sqrt(inputs). `keep` what `values` needs, too."""
    generator = torch.Generator(device).manual_seed(1)
    stored: dict[str, list[Tensor]] = {}
    kept_codes: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
    kept_scales: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
    for _ in range(shape.experts):
        for name, outputs, inputs in (("gate_up", 2 * shape.width, shape.hidden), ("down", shape.hidden, shape.width)):
            size, scales = inputs**-0.5, None
            spread = 0.5 + torch.rand(outputs, 1, device=device, generator=generator)
            if shape.weights == "int4":
                codes = torch.randint(1, 16, (outputs, inputs), device=device, dtype=torch.uint8, generator=generator)
                spread = 0.5 + torch.rand(outputs, inputs // shape.group_size, device=device, generator=generator)
                scales = (spread * size / 4.3).half()
            else:
                values = torch.randn(outputs, inputs, device=device, generator=generator)
                codes = (values * size).half() if shape.weights == "fp16" else values.mul(32).to(torch.float8_e4m3fn)
                if shape.weights == "fp8":
                    codes, scales = codes.view(torch.uint8), spread * size / 32
            packed = pack(interleave(codes, name == "gate_up"), shape.format.bits)
            stored.setdefault(f"{name}.codes", []).append(packed)
            if scales is not None:
                stored.setdefault(f"{name}.scales", []).append(pack_scales(interleave(scales, name == "gate_up")))
            if keep:
                kept_codes[name].append(codes)
                kept_scales[name] += [] if scales is None else [scales]
    return Weights({name: torch.stack(parts) for name, parts in stored.items()}, kept_codes, kept_scales, shape)


def tokens_for(shape: MoeShape, tokens: int, device: str, routing: str = "even", seed: int = 0) -> dict[str, Tensor]:
    """Buffers of one call but for the weights. Routing: "even" spreads tokens over the experts, "one" takes one expert,
    "random" draws logits."""
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, (dtype, extent) in buffers(shape, tokens).items():
        if "." not in name:
            made[name] = torch.zeros(extent, dtype=getattr(torch, dtype), device=device)
    made["x"].normal_(generator=generator)
    made["logits"].normal_(generator=generator)
    if routing != "random":
        chosen = torch.arange(tokens, device=device) * (routing == "even") + seed
        made["logits"][torch.arange(tokens, device=device), chosen % shape.experts] += 10
    return made


def reference(shape: MoeShape, weights: Weights, x: Tensor, logits: Tensor) -> Tensor:
    """model/text.py's `Experts`, in fp32, expert by expert."""
    top, chosen = logits.float().topk(shape.top_k, dim=-1)
    y = torch.zeros(x.shape, device=x.device)
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        seen = x[token].float() * torch.sigmoid(top[token, choice])[:, None]
        gate, up = (seen @ weights.values("gate_up", expert).float().T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        y.index_add_(0, token, h @ weights.values("down", expert).float().T)
    return y


# Is it right? -----------------------------------------------------------------------------------------------------------


def check(run: Run, weights: Weights, tokens: int, tiling: Tiling, routing: str, device: str) -> dict[str, Any]:
    """One case against the reference, twice. `error` is the largest difference over the largest value."""
    shape = weights.shape
    made = tokens_for(shape, tokens, device, routing, seed=tokens)
    given = {**made, **weights.stored}
    results = []
    for _ in range(2):
        given["y"] = torch.full_like(made["y"], float("nan"))
        for launch in launches(shape, tokens, tiling):
            run(launch, given)
        results.append(given["y"])
    expected = reference(shape, weights, made["x"], made["logits"])
    actual = results[0].float().reshape(tokens, shape.top_k, shape.hidden).sum(dim=1)
    error = float((actual - expected).abs().max() / expected.abs().max())
    return {
        "weights": shape.weights,
        "group_size": shape.group_size,
        "tokens": tokens,
        "top_k": shape.top_k,
        "tiling": tiling.name,
        "routing": routing,
        "error": error,
        "right": error < 2e-3,
        "repeatable": bool(torch.equal(*results)),
    }


SMALL_CASES = (
    {"weights": "int4", "group_size": 32},
    {"weights": "int4", "group_size": 64},
    {"weights": "int4", "group_size": 128, "width": 256},
    {"weights": "fp8"},
    {"weights": "fp16"},
    {"weights": "int4", "group_size": 64, "top_k": 2},
)


def check_small(
    run: Run,
    device: str,
    token_counts: tuple[int, ...] = (1, 7, 70, 600),
    routings: tuple[str, ...] = ("random", "even", "one"),
) -> Iterator[dict[str, Any]]:
    """Every format and tiling at a size that takes no time."""
    for case in SMALL_CASES:
        shape = MoeShape(**{"hidden": 128, "width": 192, "experts": 16, "top_k": 1, **case})  # type: ignore[arg-type]
        weights = random_weights(shape, device, keep=True)
        for tokens in token_counts:
            for tiling in TILINGS:
                for routing in routings:
                    yield check(run, weights, tokens, tiling, routing, device)


# On the device ----------------------------------------------------------------------------------------------------------


class Device:
    """Compiles kernels for the GPU at hand and launches them on torch's current stream."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # makes torch's context the current one
        self.driver = driver
        major, minor = torch.cuda.get_device_capability()
        plain = f"sm_{major}{minor}"
        self.architecture = f"{plain}a" if f"{plain}a" in ARCHITECTURES else plain
        self.functions: dict[Kernel, Any] = {}

    def checked(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver answered {status.name}")
        return values[0] if values else None

    def function(self, kernel: Kernel) -> Any:
        if kernel not in self.functions:
            compiled = compile_kernel(kernel, self.architecture)
            module = self.checked(self.driver.cuModuleLoadData(compiled.image))
            self.functions[kernel] = self.checked(self.driver.cuModuleGetFunction(module, compiled.entry.encode()))
        return self.functions[kernel]

    def run(self, launch: Launch, given: dict[str, Tensor]) -> None:
        values = tuple(given[a].data_ptr() if isinstance(a, str) else a for a in launch.arguments)
        types = tuple(ctypes.c_void_p if isinstance(a, str) else ctypes.c_int32 for a in launch.arguments)
        stream = self.driver.CUstream(torch.cuda.current_stream().cuda_stream)
        function = self.function(launch.kernel)
        self.checked(
            self.driver.cuLaunchKernel(function, *launch.grid, launch.threads, 1, 1, 0, stream, (values, types), 0)
        )


def seconds(*work: Callable[[], object]) -> float:
    """Median time of one of `work` when all are replayed in a row as one CUDA graph."""
    for item in work:  # compiles, and warms up
        item()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in work:
            item()
    times = []
    for _ in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(work))
    return sorted(times[1:])[REPEATS // 2]


def machine() -> dict[str, Any]:
    """What this is, and what its memory does: bytes read a second by a sum, read and written by a copy."""
    device = Device()
    properties = torch.cuda.get_device_properties(0)
    block = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    other = torch.empty_like(block)
    nbytes = block.numel() * 4
    return {
        "gpu": properties.name,
        "architecture": device.architecture,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": device.checked(device.driver.cuDriverGetVersion()),
        "torch": torch.__version__,
        "nvrtc": nvrtc_version(),
        "read_bytes_per_s": nbytes / seconds(lambda: block.sum()),
        "copy_bytes_per_s": 2 * nbytes / seconds(lambda: other.copy_(block)),
    }


def correct(**fewer: Any) -> dict[str, Any]:
    """The small cases."""
    cases = list(check_small(Device().run, "cuda", **fewer))
    wrong = [case for case in cases if not (case["right"] and case["repeatable"])]
    return {"cases": len(cases), "largest_error": max(case["error"] for case in cases), "wrong": wrong}


def sanitize() -> dict[str, Any]:
    """A few small cases under compute-sanitizer: accesses out of bounds, races in shared memory, barriers."""
    program = shutil.which("compute-sanitizer")
    if not program:
        return {"error": "there is no compute-sanitizer on the path"}
    found = {}
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "correct-few"]
        done = subprocess.run(command, capture_output=True, text=True)
        found[tool] = {"exit_code": done.returncode, "end": done.stdout.splitlines()[-3:]}
    return found


def measure(device: Device, weights: Weights, tokens: int, tiling: Tiling) -> dict[str, Any]:
    """Time of the three kernels, alone and in a row; bytes are those of the weights that must be read, and activations."""
    shape = weights.shape
    calls = [{**tokens_for(shape, tokens, "cuda", "even", seed), **weights.stored} for seed in range(VARIANTS)]
    steps = launches(shape, tokens, tiling)

    def work(call: dict[str, Tensor], chosen: tuple[Launch, ...]) -> Callable[[], None]:
        def go() -> None:
            for launch in chosen:
                device.run(launch, call)

        return go

    chain = seconds(*(work(call, steps) for call in calls))
    alone = {launch.kernel.entry: seconds(*(work(call, (launch,)) for call in calls)) for launch in steps}
    visited = min(tokens * shape.top_k, shape.experts)
    expert_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in weights.stored.values())
    activations = tokens * shape.top_k * (2 * shape.hidden + 2 * shape.width) * 2
    nbytes = visited * expert_bytes + activations
    operations = 6 * tokens * shape.top_k * shape.hidden * shape.width
    return {
        "experts": shape.experts,
        "tokens": tokens,
        "tiling": tiling.name,
        "chosen": tiling_for(shape, tokens) is tiling,
        "seconds": chain,
        "seconds_alone": alone,
        "bytes_per_s": nbytes / chain,
        "flop_per_s": operations / chain,
    }


def speed(weights: str, experts: int = 16) -> dict[str, Any]:
    """A full-width layer: right first, then its times, over numbers of tokens and both tilings."""
    device = Device()
    made = random_weights(scout(weights, experts), "cuda", keep=True)
    checks = [
        check(device.run, made, tokens, tiling_for(made.shape, tokens), "even", "cuda") for tokens in (1, 16, 600)
    ]
    made.codes.clear()
    made.scales.clear()
    torch.cuda.empty_cache()
    counts = {DECODE: (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), PREFILL: (32, 64, 128, 256, 512, 2048, 8192)}
    times = [measure(device, made, tokens, tiling) for tiling, each in counts.items() for tokens in each]
    return {"checks": checks, "times": times}


def cublas() -> dict[str, Any]:
    """torch's fp16 products (cuBLAS) over the same experts: one after the other, and in one grouped call."""
    shape = scout("fp16")
    gate_up = torch.randn(shape.experts, shape.hidden, 2 * shape.width, device="cuda", dtype=torch.float16) / 72
    down = torch.randn(shape.experts, shape.width, shape.hidden, device="cuda", dtype=torch.float16) / 90

    def expert(index: int, x: Tensor) -> Tensor:
        gate, up = (x @ gate_up[index]).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down[index]

    times: list[dict[str, Any]] = []
    for tokens in (1, 8, 16, 64, 512, 2048, 8192):
        x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.float16)
        visited = min(tokens, shape.experts)
        parts = x.chunk(visited)

        def go(first: int, parts: tuple[Tensor, ...]) -> list[Tensor]:
            return [expert((first + i) % shape.experts, part) for i, part in enumerate(parts)]

        # Other experts each time, where not all are visited anyway.
        turns = range(VARIANTS if visited < shape.experts else 1)
        time = seconds(*(functools.partial(go, first, parts) for first in turns))
        nbytes = visited * (gate_up[0].numel() + down[0].numel()) * 2
        operations = 6 * tokens * shape.hidden * shape.width
        times.append({"tokens": tokens, "seconds": time, "bytes_per_s": nbytes / time, "flop_per_s": operations / time})
    return {"loop": times, "grouped": attempt(lambda: grouped(shape, gate_up.bfloat16(), down.bfloat16()))}


def grouped(shape: MoeShape, gate_up: Tensor, down: Tensor) -> list[dict[str, Any]]:
    """torch's grouped product, which is bf16 and not in every version."""
    product: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    times = []
    for tokens in (512, 2048, 8192):
        x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        ends = torch.arange(1, shape.experts + 1, device="cuda", dtype=torch.int32) * (tokens // shape.experts)

        def both(x: Tensor = x, ends: Tensor = ends) -> None:
            gate, up = product(x, gate_up, offs=ends).chunk(2, dim=-1)
            product(torch.nn.functional.silu(gate) * up, down, offs=ends)

        time = seconds(both)
        times.append({"tokens": tokens, "seconds": time, "flop_per_s": 6 * tokens * shape.hidden * shape.width / time})
    return times


# Sections ---------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Any]] = {
    "machine": machine,
    "correct": correct,
    "correct-few": lambda: correct(token_counts=(7, 70), routings=("random",)),
    "sanitize": sanitize,
    "int4": lambda: speed("int4"),
    "fp8": lambda: speed("fp8"),
    "fp16": lambda: speed("fp16"),
    "cublas": cublas,
    "int4-128-experts": lambda: speed("int4", experts=128),
}


def attempt(work: Callable[[], Any]) -> Any:
    """The result, or what went wrong, as data."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc().splitlines()[-6:]}


def run_section(name: str, timeout_s: float) -> Any:
    """One section in a process of its own."""
    command = [sys.executable, __file__, "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:g} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": f"exit code {done.returncode}", "trace": done.stderr.splitlines()[-6:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--output", type=Path, help="write the JSON here, too, after every section")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each section (default 120)")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; expected some of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print("kernels_moe: no GPU that torch can use; this needs compute capability 8.0 or newer.", file=sys.stderr)
        return 3
    if options.only:
        print(json.dumps(attempt(SECTIONS[options.only])))
        return 0
    found: dict[str, Any] = {}
    for name in options.sections or SECTIONS:
        print(f"kernels_moe: {name} …", file=sys.stderr, flush=True)
        found[name] = run_section(name, options.timeout)
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
