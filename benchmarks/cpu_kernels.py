"""corral's CPU kernels beside ONNX Runtime's own: one checkpoint compiled for both, timed by turns through corral.runtime.

    python benchmarks/cpu_kernels.py demo/demo-scout --json
    python benchmarks/cpu_kernels.py "synthetic:scout?layers=4" --keep /somewhere/with/20/GB

Every figure is tokens per second, the median of `--repeats` with its range, and the ratio of the two medians; a round
begins with the other build each time. Random weights only mean something when routing is diverse, so the experts that a
prompt visits are counted, too. Memory is of a process of its own: anonymous (belonging to no file) after opening the
bundle and after a prompt and some tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("stock", "corral")
PREFILL, DECODE, BATCHES, DEPTH = (128, 512), 32, (1, 4, 16), 128
PROBE = """
import json, re, sys, time
from pathlib import Path
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
from corral.runtime import LLM, SamplingParams
from corral.runtime.onnxruntime_graph import import_onnxruntime
import_onnxruntime()
before, started = anonymous(), time.perf_counter()
llm = LLM(sys.argv[1], verify=False)
seconds, opened = time.perf_counter() - started, anonymous()
prompt = list(range(100, 228))
llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
print(json.dumps({"load_s": seconds, "opened": opened - before, "used": anonymous() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", type=Path, help="Directory for the bundles; used again where they are there.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = compiled(options.checkpoint, options.keep or Path(scratch), options.group_size)
        visited = experts_visited(bundles["stock"])
        report = {
            "checkpoint": options.checkpoint,
            "experts visited": visited,
            "memory": {kind: probe(bundle) for kind, bundle in bundles.items()},
            "speed": compare(
                {kind: Steps(bundle, options.threads) for kind, bundle in bundles.items()}, options.repeats
            ),
        }
    print(json.dumps(report, indent=1) if options.json else in_words(report))
    if visited and visited[0] < 0.75 * visited[1]:
        sys.exit(
            f"only {visited[0]} of {visited[1]} experts were visited: these figures say nothing about real routing"
        )


def compiled(checkpoint: str, directory: Path, group_size: int) -> dict[str, Path]:
    """A bundle for each kind of kernels, of the same weights."""
    from corral.graphs import compile
    from corral.spec.recipe import Recipe

    bundles = {kind: directory / f"{kind}-g{group_size}" for kind in KINDS}
    for kind, bundle in bundles.items():
        if not (bundle / "manifest.json").exists():
            compile(checkpoint, bundle, Recipe(target="cpu", weights="int4", group_size=group_size, kernels=kind))
    return bundles


class Steps:
    """A bundle's session, and steps of random tokens through it."""

    def __init__(self, directory: Path, threads: int | None) -> None:
        from corral.runtime.embedding import EmbeddingTable
        from corral.runtime.onnxruntime_session import OnnxRuntimeSession
        from corral.spec.bundle import open_bundle

        bundle = open_bundle(directory, verify=False)
        self.session, self.embed = OnnxRuntimeSession(bundle, threads=threads), EmbeddingTable(bundle)
        self.model, self.layouts = bundle.manifest.model, bundle.manifest.kv
        self.rng = np.random.default_rng(0)

    def run(self, batch: int, tokens: int, depth: int, times: int = 1) -> float:
        """Tokens per second of `times` steps of `tokens` each for `batch` sequences that have `depth` tokens behind them."""
        from corral.runtime.session import CacheView, Step

        rows, caches = depth + tokens * times, {}
        for layout in self.layouts:
            shape = (batch, layout.num_heads, layout.capacity(rows), layout.head_dim)
            caches |= {layer: (np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for layer in layout.layers}
        keys, values = zip(*(caches[layer] for layer in range(self.model.num_layers)), strict=True)
        view, seconds = CacheView(keys, values), 0.0
        for turn in range(times):
            past = depth + turn * tokens
            ids = self.rng.integers(0, self.model.vocab_size, batch * tokens)
            step = Step(
                embeddings_BSH=self.embed(ids).reshape(batch, tokens, -1),
                positions_BS=np.tile(np.arange(past, past + tokens), (batch, 1)),
                logit_rows_BR=np.full((batch, 1), tokens - 1),
                past_length_B={layout.kv_class: np.full(batch, past) for layout in self.layouts},
                caches=view,
            )
            started = time.perf_counter()
            self.session.run(step)
            seconds += time.perf_counter() - started
        return batch * tokens * times / seconds


def compare(builds: dict[str, Steps], repeats: int) -> dict[str, Any]:
    """Every test for all builds by turns."""
    chunk = min((layout.chunk for layout in builds["stock"].layouts if layout.chunk), default=1 << 30)
    depth = min(DEPTH, chunk - DECODE)
    tests: dict[str, Callable[[Steps], float]] = {
        f"prefill {n}": lambda build, n=n: build.run(1, n, 0) for n in PREFILL if n <= chunk
    } | {f"decode, {b} sequences": lambda build, b=b: build.run(b, 1, depth, DECODE) for b in BATCHES}
    results: dict[str, Any] = {}
    for name, test in tests.items():
        samples: dict[str, list[float]] = {kind: [] for kind in builds}
        for turn in range(1 + repeats):
            for kind in list(builds)[:: 1 if turn % 2 else -1]:
                sample = test(builds[kind])
                if turn:  # the first round only warms up
                    samples[kind].append(sample)
        medians = {kind: statistics.median(values) for kind, values in samples.items()}
        results[name] = {"ratio": medians["corral"] / medians["stock"], "tokens_per_second": samples}
    return results


def experts_visited(bundle: Path) -> tuple[int, int] | None:
    """(fewest experts that 512 random tokens visit in a layer, all experts); None without experts."""
    import onnx

    from corral.spec.bundle import open_bundle

    manifest = open_bundle(bundle, verify=False).manifest
    experts = manifest.model.num_local_experts
    graph = bundle / manifest.graphs[0].path
    model = onnx.load(graph, load_external_data=False)
    routers = [node.output[0] for node in model.graph.node if node.op_type == "MatMul" and "router" in node.name]
    if not routers:
        return None
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in routers)
    changed = graph.with_name("routers.onnx")
    onnx.save(model, changed)
    try:
        logits = _first_stage(changed, manifest, bundle)
    finally:
        changed.unlink()
    return min(len(set(values.reshape(-1, experts).argmax(-1).tolist())) for values in logits), experts


def _first_stage(graph: Path, manifest: Any, bundle: Path) -> list[Any]:
    import onnxruntime

    from corral.runtime.embedding import EmbeddingTable
    from corral.spec.bundle import open_bundle

    tokens = min([512, *(layout.chunk for layout in manifest.kv if layout.chunk)])
    ids = np.random.default_rng(1).integers(0, manifest.model.vocab_size, tokens)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "embeddings": EmbeddingTable(open_bundle(bundle, verify=False))(ids)[None],
        "positions": np.arange(tokens)[None],
        "logit_rows": np.array([[tokens - 1]]),
    }
    for layout in manifest.kv:
        shape = (1, layout.num_heads, layout.capacity(tokens), layout.head_dim)
        feeds[f"past_length.{layout.kv_class}"] = np.zeros(1, np.int64)
        for layer in layout.layers:
            feeds |= {f"past_{part}.{layer}": np.zeros(shape, np.float32) for part in ("key", "value")}
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in wanted})


def probe(bundle: Path) -> dict[str, float]:
    """Load time and anonymous memory, of a fresh process."""
    done = subprocess.run([sys.executable, "-c", PROBE, bundle], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), "bundle": sum(path.stat().st_size for path in bundle.iterdir())}


def in_words(report: dict[str, Any]) -> str:
    lines = [f"{report['checkpoint']}: experts visited (fewest of a layer, all): {report['experts visited']}"]
    for kind, memory in report["memory"].items():
        lines.append(
            f"  {kind:8} bundle {memory['bundle'] / 1e6:8.1f} MB; opened in {memory['load_s']:.2f} s; anonymous memory "
            f"{memory['opened'] / 1e6:.1f} MB, {memory['used'] / 1e6:.1f} MB after a prompt"
        )
    for name, result in report["speed"].items():
        figures = "; ".join(
            f"{kind} {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for kind, values in result["tokens_per_second"].items()
        )
        lines.append(f"  {name:24} {result['ratio']:.2f} x   tokens/s: {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
