"""What a byte buys: corral's builds of a checkpoint beside llama.cpp's, by one measure on one text.

    python benchmarks/llama_cpp_accuracy.py demo/demo-scout --text demo/demo-scout/heldout.txt --peer /somewhere/with/1/GB

A row more, beside those of an earlier run on the same text, without llama.cpp:

    python benchmarks/llama_cpp_accuracy.py demo/demo-scout --text demo/demo-scout/heldout.txt --recipe tuned.toml \
        --beside benchmarks/results/accuracy-demo.json --json benchmarks/results/accuracy-demo.json

llama.cpp converts, calibrates (importance matrix of the text that corral calibrates on) and quantizes with its own
tools. Every build then computes logits of the same tokens, and `corral.validate` holds them against the checkpoint in
float32: KL divergence in nats a token, with its standard error. Sizes are of everything that must be shipped: the GGUF
file, or all files of the bundle.

llama.cpp knows no chunk but Llama 4's 8192 tokens and no temperature that starts elsewhere, so windows end before the
checkpoint's own chunk does; there both compute the same function, which the build `llama.cpp F32` shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cpp_peer import VERSION, Gguf, Peer, build

from corral.graphs import compile
from corral.graphs.calibrate.calibration_text import SHIPPED
from corral.spec.machine import usable_cores
from corral.spec.model_config import ModelConfig
from corral.spec.recipe import Recipe, read_recipe
from corral.validate.accuracy import Accuracy, measure_accuracy
from corral.validate.build import Logits, Run, open_build
from corral.validate.windows import cut_windows, encode_alike

QUANTS = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
RECIPES = {
    f"corral {weights} g{group} {method}": Recipe(weights=weights, group_size=group, method=method)
    for weights, groups, methods in (
        ("int4", (32, 64, 128), ("rtn", "rtn-mse", "hqq", "awq", "gptq")),
        ("int8", (128,), ("rtn",)),
    )
    for group in groups
    for method in methods
}


@dataclass(frozen=True)
class GgufBuild:
    """A GGUF file as one more build that corral can measure."""

    name: str
    path: Path
    model: Gguf
    config: ModelConfig
    kind: str = "gguf"

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def encode(self, text: str) -> list[int] | None:
        return None  # it takes the ids that the checkpoint's own tokenizer gives

    def logits(self, token_ids: Sequence[int]) -> Iterator[Logits]:
        yield self.model.logits(token_ids)

    def time_decode(self, token_ids: Sequence[int], count: int) -> Run | None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--peer", type=Path, help="Where llama.cpp is built, or was: its builds and the usual ones of corral."
    )
    what.add_argument(
        "--beside", type=Path, metavar="JSON", help="Keep these rows, and measure only those of --recipe."
    )
    parser.add_argument("--recipe", type=Path, action="append", default=[], help="A recipe file more, by its name.")
    parser.add_argument("--predictions", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipes = dict(RECIPES) if options.peer else {}
    recipes |= {f"corral {path.stem}": read_recipe(path) for path in options.recipe}
    threads = usable_cores()
    with tempfile.TemporaryDirectory() as scratch:
        reference = open_build(options.checkpoint, provider="cpu", threads=threads)
        window = min(512, reference.config.attention_chunk_size or 512) - 1
        report = {"checkpoint": str(options.checkpoint), "window": window, "llama-cpp-python": VERSION}
        report["predictions"] = options.predictions
        kept = rows_of(options.beside, report) if options.beside else []
        builds: list[Any] = []
        if options.peer:
            peer = build(options.peer)
            builds += ggufs(peer, options.checkpoint, reference.config, Path(scratch), threads)
        for name, recipe in recipes.items():
            made = compile(options.checkpoint, Path(scratch) / name.replace(" ", "-"), recipe)
            opened = open_build(made.directory, provider="cpu", threads=threads)
            builds.append(opened)
            opened.name = name
        ids = encode_alike(options.text.read_text(), [reference])
        windows = list(
            cut_windows(ids, size=window, predictions=options.predictions, bos=reference.config.bos_token_id)
        )
        _, accuracies = measure_accuracy(reference, builds, windows)
    measured = [row(b.name, b.bytes, a) for b, a in zip(builds, accuracies, strict=True)]
    rows = sorted([r for r in kept if r["name"] not in recipes] + measured, key=lambda r: r["bytes"])
    print(in_words(rows, window))
    if options.json:
        options.json.write_text(json.dumps(report | {"builds": rows}, indent=1) + "\n")


def rows_of(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The builds of an earlier run, if it was on the same tokens of the same checkpoint."""
    earlier = json.loads(path.read_text())
    if differing := [key for key, value in report.items() if earlier[key] != value]:
        sys.exit(f"{path} was measured otherwise: {', '.join(f'{key} {earlier[key]}' for key in differing)}")
    builds: list[dict[str, Any]] = earlier["builds"]
    return builds


def ggufs(peer: Peer, checkpoint: Path, config: ModelConfig, scratch: Path, threads: int) -> Iterator[GgufBuild]:
    """The checkpoint as llama.cpp's own tools make it: not quantized, and in each quantization with its importance matrix."""
    whole = peer.convert(checkpoint, scratch / "F32.gguf")
    imatrix = peer.imatrix(whole, SHIPPED[Recipe().calibration], scratch / "imatrix.gguf", threads=threads)
    files = {"F32": whole} | {q: peer.quantize(whole, scratch / f"{q}.gguf", q, imatrix) for q in QUANTS}
    for kind, file in files.items():
        yield GgufBuild(f"llama.cpp {kind}", file, Gguf(peer, file, threads=threads, context=512), config)


def row(name: str, size: int, accuracy: Accuracy) -> dict[str, Any]:
    return {
        "name": name,
        "bytes": size,
        "kl": accuracy.kl.mean,
        "kl_stderr": accuracy.kl.stderr,
        "kl_p99": accuracy.kl.p99,
        "top1": accuracy.top1_agreement.mean,
        "perplexity_ratio": accuracy.perplexity_ratio.mean,
    }


def in_words(rows: Sequence[dict[str, Any]], window: int) -> str:
    lines = [f"Windows of {window} tokens; KL against the checkpoint in float32, nats a token."]
    lines.append(f"{'build':28} {'MB':>7} {'KL':>9} {'±':>8} {'p99':>8} {'same top-1':>10} {'perplexity x':>12}")
    for r in rows:
        lines.append(
            f"{r['name']:28} {r['bytes'] / 1e6:7.2f} {r['kl']:9.5f} {r['kl_stderr']:8.5f} {r['kl_p99']:8.4f} "
            f"{r['top1']:10.1%} {r['perplexity_ratio']:12.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
