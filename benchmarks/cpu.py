"""corral beside llama.cpp on this CPU: the same weights, the same tests, by turns, through what users call.

    python benchmarks/cpu.py --shape demo --work /somewhere/with/1/GB --json
    python benchmarks/cpu.py --shape wide --work /somewhere/with/50/GB

Each engine has a process of its own and answers one test at a time; a round begins with the other one each time. Figures
are medians of `--repeats` (decoding: three times as many) with their range; `ratio` is corral's median over llama.cpp's
best. `prefill N` is N tokens to the first chosen one, `decode at D` one sequence with D tokens behind it, `B sequences`
their tokens together. The share of the roofline is bytes of weights a token touches times tokens a second, over the
bandwidth that this machine had just before and after the sample. What lies 8k and 32k behind ends a little before the end
of a chunk of 8192 tokens: there a rope layer sees the most. corral's int4 is made as `cpu_shapes.Shape` says; more builds
of the demo are held against each other by benchmarks/llama_cpp_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpu_engines import Result, Test, Worker
from cpu_shapes import (
    SAME_GROUP,
    SAME_VALUES,
    SHAPES,
    Shape,
    bundle_of,
    checkpoint_of,
    experts_visited,
    gguf_bytes_per_token,
    gguf_of,
    touched_bytes,
    windows_of,
)
from llama_cpp_peer import VERSION, Gguf, Peer, build

from corral.spec.bundle import open_bundle
from corral.spec.machine import usable_cores
from corral.spec.model_config import ModelConfig

DECODED = 33  # the first token of a test belongs to its prefill
QUANTS = ("Q4_0", "Q4_K_M")  # llama.cpp's fastest of these bits, and the one its users take
PREFILL, DEPTHS, SEQUENCES = (128, 512, 2048), (16, 7936, 32512), (4, 8, 16)
DEEP = 2048  # tokens: prompts from here on are read once, and each round writes on where the one before ended
PEER_CHUNK = 8192  # tokens: the only attention chunk that llama.cpp has
LEAST_VISITED = 0.75  # of a layer's experts, by 512 random tokens: otherwise figures say nothing about real routing
COLD_STARTS = 5
SAMPLE_SECONDS, MOST_RUNS = 0.3, 9  # what takes less than that is run several times a sample, whose rate is the median
DECODES = 3  # times as many samples of plain decoding: they are short, and follow the memory's speed of the moment
BANDWIDTH_MIB = 256  # far more than caches hold; too little to push a model's file out of memory


@dataclass(frozen=True)
class Contestant:
    """One engine with one file, and the bytes of weights that one token touches."""

    name: str
    engine: str
    model: Path
    token_bytes: int

    @property
    def is_ours(self) -> bool:
        return self.engine == "corral"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--work", type=Path, required=True, help="For llama.cpp and the models; used again.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--group-size", type=int, help="Of corral's int4, instead of the shape's.")
    parser.add_argument(
        "--same-values",
        action="store_true",
        help=f"Both with the same codes and scales, in groups of {SAME_GROUP}: Q4_0 written by corral's rounding.",
    )
    parser.add_argument("--kl", action="store_true", help="Of every build to the checkpoint in float32, too.")
    parser.add_argument("--depth", type=int, action="append", help="Of decoding; may be given several times.")
    parser.add_argument("--only", action="append", metavar="TEST", help="Of the tests; may be given several times.")
    parser.add_argument("--stock", action="store_true", help="ONNX Runtime's own kernels, too.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    peer, directory = build(options.work / "llama.cpp"), options.work / options.shape
    checkpoint = checkpoint_of(options.shape, options.work)
    shape = SHAPES[options.shape]
    group_size, method, quants = options.group_size or shape.group_size, shape.method, QUANTS
    if options.same_values:
        group_size, method, quants = SAME_GROUP, "rtn", (SAME_VALUES,)
    kernels = {"corral": "corral"} | ({"corral, stock kernels": "stock"} if options.stock else {})
    ours = {name: bundle_of(checkpoint, directory, kind, group_size, method) for name, kind in kernels.items()}
    if (visited := experts_visited(ours["corral"])) and visited[0] < LEAST_VISITED * visited[1]:
        sys.exit(f"only {visited[0]} of {visited[1]} experts were visited: no figure would mean anything")
    contestants = [Contestant(name, "corral", path, touched_bytes(open_bundle(path))) for name, path in ours.items()]
    for quant in quants:
        path = gguf_of(checkpoint, directory, peer, quant)
        contestants.append(Contestant(f"llama.cpp {quant}", "llama.cpp", path, gguf_bytes_per_token(path, peer)))
    start = partial(Worker, threads=options.threads, peer=peer.directory)
    cold = cold_starts(contestants, start, min(options.repeats, COLD_STARTS))
    workers = {one.name: start(one.engine, one.model) for one in contestants}
    memory = {name: worker.memory() for name, worker in workers.items()}
    tests = tests_of(open_bundle(ours["corral"]).manifest.model, options.depth or DEPTHS, 1 + options.repeats)
    tests = {name: test for name, test in tests.items() if not options.only or name in options.only}
    bandwidth = partial(measure_bandwidth, options.work, options.threads)
    samples, after = {}, {}
    for name, test in tests.items():
        shallow = test.sequences == test.rounds == 1 < test.tokens
        samples[name] = measure(test, contestants, workers, options.repeats * (DECODES if shallow else 1), bandwidth)
        if test.rounds == 1:  # the others come last: their caches are not a model's usual memory
            after = {one: worker.memory()["now"] for one, worker in workers.items()}
    report = {
        "shape": options.shape,
        "ratio": ratios(samples, contestants),
        "tests": {name: dict(zip(found, map(summary, found.values()), strict=True)) for name, found in samples.items()},
        "models": {
            one.name: {
                "bytes": sum(path.stat().st_size for path in one.model.rglob("*") if path.is_file())
                if one.is_ours
                else one.model.stat().st_size,
                "bytes_a_token": one.token_bytes,
                "cold_to_second_token_s": statistics.median(cold[one.name]),
                "cold_samples_s": cold[one.name],
                "anonymous_bytes": memory[one.name] | {"after": after[one.name]},
            }
            for one in contestants
        },
        "group_size": group_size,
        "method": method,
        "experts_visited": visited,
        "machine": {"cpu": cpu(), "threads": options.threads, "llama-cpp-python": VERSION},
    }
    for worker in workers.values():
        worker.close()
    if options.kl:
        report["kl"] = divergences(shape, checkpoint, contestants, peer, options.threads)
    print(json.dumps(report, indent=1) if options.json else in_words(report))


def divergences(
    shape: Shape, checkpoint: str, contestants: Sequence[Contestant], peer: Peer, threads: int
) -> dict[str, float]:
    """KL of each build to the checkpoint in float32, nats a token."""
    from llama_cpp_accuracy import GgufBuild
    from streamed_reference import StreamedReference

    from corral.model.checkpoint import open_checkpoint
    from corral.validate.accuracy import measure_accuracy
    from corral.validate.build import Build, open_build

    opened = open_checkpoint(checkpoint)
    windows = windows_of(opened, shape.text)
    reference: Any = StreamedReference(opened, windows)
    builds: list[Build] = []
    for one in contestants:
        if one.is_ours:
            builds.append(open_build(one.model, provider="cpu", threads=threads))
        else:
            gguf = Gguf(peer, one.model, threads=threads, context=512)
            builds.append(GgufBuild(one.name, one.model, gguf, opened.config))
    _, found = measure_accuracy(reference, builds, windows)
    return {one.name: accuracy.kl.mean for one, accuracy in zip(contestants, found, strict=True)}


def tests_of(model: ModelConfig, depths: Sequence[int], rounds: int) -> dict[str, Test]:
    """Those that the model has the context for; far behind, only where llama.cpp computes the same attention."""
    tests = {f"prefill {n}": Test(1, n, 1) for n in PREFILL}
    tests |= {f"decode at {depth}": Test(1, depth, DECODED) for depth in depths if depth < DEEP}
    tests |= {f"{n} sequences": Test(n, 16, DECODED) for n in SEQUENCES}
    if model.attention_chunk_size == PEER_CHUNK:
        tests |= {f"decode at {depth}": Test(1, depth, DECODED, rounds) for depth in depths if depth >= DEEP}
    most = model.max_position_embeddings
    return {name: test for name, test in tests.items() if test.prompt + test.tokens * test.rounds <= most}


def cold_starts(contestants: Sequence[Contestant], start: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of new processes: interpreter, imports, opening, 16 tokens, one more. Files are in memory by then."""
    found: dict[str, list[float]] = {one.name: [] for one in contestants}
    for turn in range(1 + repeats):  # the first round brings the files into memory
        for one in contestants[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            worker = start(one.engine, one.model)
            worker.run(Test(1, 16, 2))
            if turn:
                found[one.name].append(time.perf_counter() - started)
            worker.close()
    return found


def measure(
    test: Test, contestants: Sequence[Contestant], workers: Mapping[str, Worker], repeats: int, bandwidth: Any
) -> dict[str, list[dict[str, float]]]:
    """Samples of every contestant: tokens a second, and the share of the roofline where one token is decoded at a time."""
    found: dict[str, list[dict[str, float]]] = {one.name: [] for one in contestants}
    runs, slowest = 1, 0.0
    for turn in range(1 + repeats):  # the first round only warms up
        for one in contestants[:: 1 if turn % 2 else -1]:
            before = bandwidth()
            results = [workers[one.name].run(test) for _ in range(runs)]
            after = bandwidth()
            rate = statistics.median(tokens_per_second(test, result) for result in results)
            slowest = max(slowest, *(result.prefill + result.decode for result in results))
            if turn:
                share = rate * one.token_bytes / ((before + after) / 2) if test.sequences == 1 < test.tokens else 0.0
                found[one.name].append({"rate": rate, "share": share, "before": before, "after": after})
        if not turn and test.rounds == 1:
            runs = min(max(1, round(SAMPLE_SECONDS / slowest)), MOST_RUNS)
    return found


def tokens_per_second(test: Test, result: Result) -> float:
    if test.tokens == 1:
        return test.sequences * test.prompt / result.prefill
    return test.sequences * (test.tokens - 1) / result.decode


def ratios(samples: Mapping[str, Any], contestants: Sequence[Contestant]) -> dict[str, float]:
    """corral's median over the best of llama.cpp's, of each test; `decode`, `prefill` and `batch16` stand for the usual."""
    found = {}
    for name, by_contestant in samples.items():
        medians = {one: statistics.median(s["rate"] for s in by_contestant[one]) for one in by_contestant}
        theirs = max(medians[one.name] for one in contestants if not one.is_ours)
        found[name] = medians["corral"] / theirs
    usual = {"decode": f"decode at {DEPTHS[0]}", "prefill": "prefill 512", "batch16": "16 sequences"}
    return {short: found[name] for short, name in usual.items() if name in found} | found


def summary(samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    rates = [sample["rate"] for sample in samples]
    return {
        "tokens_per_second": statistics.median(rates),
        "range": [min(rates), max(rates)],
        "roofline": statistics.median(sample["share"] for sample in samples),
        "samples": samples,
    }


def measure_bandwidth(work: Path, threads: int) -> float:
    """Bytes a second that this machine's memory gives just now."""
    program = work / "bandwidth"
    if not program.exists():
        source = Path(__file__).with_name("bandwidth.cc")
        subprocess.run(["g++", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
    done = subprocess.run([program, str(threads), str(BANDWIDTH_MIB), "3"], capture_output=True, text=True, check=True)
    return float(done.stdout)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_words(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['shape']} on {report['machine']['cpu']}, {report['machine']['threads']} threads; tokens a second"
    ]
    for test, found in report["tests"].items():
        lines.append(f"{test}: {report['ratio'][test]:.2f} x llama.cpp's best")
        for name, one in found.items():
            low, high = one["range"]
            roofline = f", {one['roofline']:.0%} of the roofline" if one["roofline"] else ""
            lines.append(f"    {name:24} {one['tokens_per_second']:8.1f} ({low:.1f} to {high:.1f}){roofline}")
    lines += [f"KL {name}: {kl:.5f}" for name, kl in report.get("kl", {}).items()]
    for name, model in report["models"].items():
        memory = model["anonymous_bytes"]
        lines.append(
            f"{name:24} {model['bytes'] / 1e6:8.1f} MB, {model['bytes_a_token'] / 1e6:.1f} MB a token; process to second "
            f"token {model['cold_to_second_token_s']:.2f} s; anonymous {(memory['after'] - memory['imported']) / 1e6:.0f} MB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
