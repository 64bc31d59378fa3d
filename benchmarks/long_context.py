"""A million tokens of context, really run: memory a token, time a decode step as depth grows, and whether logits are right.

    python benchmarks/long_context.py --work /somewhere/with/1/GB --json
    python benchmarks/long_context.py --work /tmp/long --tokens 65536

Two small models (benchmarks/long_context_model.py) read a text of random tokens through `LLM.generate` and write the last 32
tokens of the context, each with every kind of KV cache in a process of its own. At marks on the way the token just read is
computed again, as decode steps on the caches as they are: these are timed, and their logits are compared with a PyTorch
reference that has no cache. What model `rope` takes must stay what it is at the end of the first chunk; what `nope` takes
beyond it grows with the depth. Reading a million tokens on two cores takes `nope` about twenty minutes a run; a run whose
result lies in the work directory is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peak_memory import memory

from corral.runtime import LLM, SamplingParams
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.runtime.session import Caches, Float32, Step
from corral.spec.bundle import open_bundle
from corral.spec.kv_layout import KvLayout
from corral.spec.machine import usable_cores

WRITTEN = 32  # tokens, the last of the context
FIRST_MARK = 512  # tokens; the next ones are twice as far each
STEPS = 33  # timed at each mark, after one that is not
PARTS = 16  # of the text, each of which has words of its own: logits depend on all of them


class Watched:
    """A session that times decode steps on the way, by repeating the last token of a step that ends at a mark."""

    def __init__(self, session: OnnxRuntimeSession, marks: Sequence[int]) -> None:
        self._session, self._marks = session, frozenset(marks)
        self.found: list[dict[str, Any]] = []
        self.logits: list[Float32] = []

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> Caches:
        return self._session.new_caches(layouts, max_context)

    def run(self, step: Step) -> Float32:
        logits = self._session.run(step).copy()  # the next run writes over it
        if (depth := int(step.positions_BS[0, -1]) + 1) in self._marks:
            self._measure(step, depth)
        return logits

    def release(self) -> None:
        self._session.release()

    def _measure(self, step: Step, depth: int) -> None:
        """The same row is written again, with the same token."""
        read = step.positions_BS.shape[1] - 1
        last = Step(
            embeddings_BSH=step.embeddings_BSH[:, read:],
            positions_BS=step.positions_BS[:, read:],
            logit_rows_BR=np.zeros((1, 1), np.int64),
            past_length_B={kv_class: length + read for kv_class, length in step.past_length_B.items()},
            caches=step.caches,
        )
        seconds = []
        for _ in range(1 + STEPS):
            started = time.perf_counter()
            logits = self._session.run(last)
            seconds.append(time.perf_counter() - started)
        self.logits.append(logits[0, 0].copy())
        self.found.append(
            {"depth": depth, "anonymous_bytes": memory(os.getpid())["anonymous"], "step_seconds": seconds[1:]}
        )
        print(f"{depth} tokens: {1e3 * statistics.median(seconds[1:]):.2f} ms a step", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="For models and the results of single runs.")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="Of the context.")
    parser.add_argument("--kv", action="append", help="Type of the KV cache; may be given several times.")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)  # the bundle, and where to write
    options = parser.parse_args()
    if options.worker:
        write_run(*options.worker, options.tokens, options.threads)
        return
    from cpu import cpu
    from long_context_model import MODELS, Reference, bundle_of, checkpoint_of

    runs = []
    for model in MODELS:
        reference = Reference(checkpoint_of(model, options.work))
        for kv in options.kv or ["float", "int8"]:
            out = options.work / f"{model}-{kv}-{options.tokens}.npz"
            if not out.exists():
                print(f"{model} layers, KV cache in {kv}", file=sys.stderr, flush=True)
                bundle = bundle_of(model, kv, options.work)
                more = ["--work", options.work, "--tokens", str(options.tokens), "--threads", str(options.threads)]
                subprocess.run([sys.executable, __file__, "--worker", bundle, out, *more], check=True)
            runs.append({"model": model, "kv": kv, **compared(out, reference)})
    report = {"tokens": options.tokens, "runs": runs, "machine": {"cpu": cpu(), "threads": options.threads}}
    print(json.dumps(report, indent=1) if options.json else in_words(report))


def marks_of(tokens: int) -> list[int]:
    """Depths at which decode steps are timed, the last two where the prompt ends and after the last step of all."""
    marks, end = [FIRST_MARK], tokens - WRITTEN
    while 2 * marks[-1] < end:
        marks.append(2 * marks[-1])
    return [*marks, end, tokens - 1]


def text_of(tokens: int, vocabulary: int) -> NDArray[np.int64]:
    """Random token ids [tokens], those of each part of the text from a part of the vocabulary."""
    words = vocabulary // PARTS
    return np.arange(tokens) * PARTS // tokens * words + np.random.default_rng(0).integers(0, words, tokens)


def write_run(path: Path, out: Path, tokens: int, threads: int) -> None:
    """Read and write the whole context; keep what was measured, the text and the logits at the marks."""
    bundle = open_bundle(path)
    session = Watched(OnnxRuntimeSession(bundle, threads=threads), marks_of(tokens))
    llm = LLM(bundle, session=session, max_context=tokens)
    prompt = text_of(tokens - WRITTEN, llm.config.vocab_size)
    opened = memory(os.getpid())
    params = SamplingParams(max_tokens=WRITTEN, temperature=0, ignore_eos=True)
    [answer] = llm.generate([prompt], params)
    layouts = bundle.manifest.kv
    kept = {
        "bytes_a_token": {kv.kv_class: kv.row_bytes() for kv in layouts},
        "promised_bytes": sum(kv.bytes(tokens) for kv in layouts),
        "peak_bytes": peak_resident_bytes() - opened["resident"],
        "read_seconds": answer.timings.first_token,
        "written_step_seconds": answer.timings.between_tokens,
        "marks": [
            {
                "depth": mark["depth"],
                "promised_bytes": sum(kv.bytes(mark["depth"]) for kv in layouts),
                "bytes": mark["anonymous_bytes"] - opened["anonymous"],
                "step_seconds": spread(mark["step_seconds"]),
            }
            for mark in session.found
        ],
    }
    np.savez(
        out, ids=np.concatenate([prompt, answer.token_ids]), logits=np.stack(session.logits), kept=json.dumps(kept)
    )


def peak_resident_bytes() -> int:
    """Of this process since it began; getrusage would count the process that started it."""
    return memory(os.getpid(), {"peak": "VmHWM"})["peak"]


def compared(run: Path, reference: Any) -> dict[str, Any]:
    """What a run found, and at each mark how far its logits are from the reference's."""
    found = np.load(run)
    kept, ids = json.loads(str(found["kept"])), found["ids"]
    positions = [mark["depth"] - 1 for mark in kept["marks"]]
    true = reference.logits(ids, positions)
    for mark, got, want in zip(kept["marks"], found["logits"], true, strict=True):
        mark["logits"] = distance(got, want)
    half = reference.logits(ids, positions[-1:], first_seen=len(ids) // 2)
    return {**kept, "without_first_half": distance(half[0], true[-1])}


def distance(got: Float32, want: Float32) -> dict[str, Any]:
    """The largest difference, as a share of the largest logit, and KL(want || got) in nats."""
    p, q = (logits - np.logaddexp.reduce(logits.astype(np.float64)) for logits in (want, got))
    return {
        "error": float(np.abs(got - want).max() / np.abs(want).max()),
        "kl": float((np.exp(p) * (p - q)).sum()),
        "same_token": int(got.argmax()) == int(want.argmax()),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def in_words(report: dict[str, Any]) -> str:
    lines = []
    for run in report["runs"]:
        tokens = report["tokens"]
        lines.append(
            f"{run['model']} layers, KV cache in {run['kv']}: {tokens} tokens, read in {run['read_seconds']:.0f} s; peak "
            f"{run['peak_bytes'] / 1e6:.1f} MB, promised {run['promised_bytes'] / 1e6:.1f} MB; logits without the first half "
            f"of the text: {run['without_first_half']['error']:.1e}"
        )
        for mark in run["marks"]:
            step, logits = mark["step_seconds"], mark["logits"]
            lines.append(
                f"{mark['depth']:10} tokens: {1e3 * step['median']:7.2f} ms a step ({1e3 * step['lowest']:.2f} to "
                f"{1e3 * step['highest']:.2f}), {mark['bytes'] / 1e6:7.1f} MB (promised {mark['promised_bytes'] / 1e6:.1f}), "
                f"logits off by {logits['error']:.1e}, KL {logits['kl']:.1e}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
