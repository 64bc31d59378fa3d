"""Requests that arrive one by one: answered together as they come and go, or one after the other.

    python benchmarks/continuous_batching.py --work /somewhere --json >benchmarks/results/continuous-batching.json

Without --bundle it is the demo model in int4 for corral's kernels, which is compiled in the work directory once. Prompts are
pieces of a text, answers have a length of their own each; arrivals are a Poisson process whose rate is `--load` of what the
bundle answers when all requests are there at once. Each request has a thread that streams it, as in a server. Both ways see
the same requests at the same times, by turns; greedy answers must be equal, otherwise nothing is reported. Tokens a second
are those of all answers from the first arrival to the last token; a request's first token counts from its arrival.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prompt_lookup import TEXT, summary

from corral.runtime import LLM, SamplingParams
from corral.spec.machine import usable_cores

PROMPT_TOKENS, ANSWER_TOKENS = (16, 256), (16, 128)  # least and most, evenly spread
WAYS = {"one at a time": 1, "together": 16}  # requests that run at once, at most


@dataclass
class Visitor:
    """One request: when it arrives, what it asks, and when its tokens came, in seconds."""

    arrival: float
    prompt: list[int]
    tokens: int
    came: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    def ask(self, llm: LLM, start: float) -> None:
        time.sleep(max(0.0, start + self.arrival - time.perf_counter()))
        params = SamplingParams(max_tokens=self.tokens, temperature=0, ignore_eos=True)
        for piece in llm.stream(self.prompt, params):
            self.came += [time.perf_counter() - start] * len(piece.token_ids)
            self.answer += piece.token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="For the demo's bundle; used again.")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--load", type=float, default=0.6, help="Of what the bundle can answer.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from cpu import cpu
    from cpu_shapes import demo_bundle

    bundle = options.bundle or demo_bundle(options.work)
    llms = {way: LLM(bundle, threads=options.threads, max_batch=most) for way, most in WAYS.items()}
    tokenizer = llms["together"].tokenizer
    if tokenizer is None:
        sys.exit(f"{bundle} has no tokenizer")
    ids = tokenizer.encode(options.text.read_text())
    rate = options.load * capacity(llms["together"], ids, options.requests)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.repeats):
        answers = []
        for way in list(WAYS)[:: -1 if turn % 2 else 1]:
            visitors = crowd(ids, options.requests, rate, seed=turn)
            found[way].append(serve(llms[way], visitors))
            answers.append([visitor.answer for visitor in visitors])
        if answers[0] != answers[1]:
            sys.exit("answers differ: no figure would mean anything")
    ways = {way: {name: summary([one[name] for one in runs]) for name in runs[0]} for way, runs in found.items()}
    setting = {name: getattr(options, name) for name in ("requests", "load", "repeats", "threads")}
    report = {"ways": ways, "requests_per_second": rate, "setting": setting, "machine": cpu()}
    print(json.dumps(report, indent=1) if options.json else in_words(report))


def capacity(llm: LLM, ids: list[int], requests: int) -> float:
    """Requests a second when all are there at once."""
    for _ in range(2):  # the first round only warms up
        visitors = crowd(ids, requests, rate=np.inf, seed=0)
        serve(llm, visitors)
    return requests / max(visitor.came[-1] for visitor in visitors)


def crowd(ids: list[int], count: int, rate: float, seed: int) -> list[Visitor]:
    """So many requests, `rate` a second."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    prompts, answers = (rng.integers(*spread, count) for spread in (PROMPT_TOKENS, ANSWER_TOKENS))
    starts = rng.integers(0, len(ids) - PROMPT_TOKENS[1], count)
    return [
        Visitor(float(arrival), ids[start : start + prompt], int(answer))
        for arrival, start, prompt, answer in zip(arrivals, starts, prompts, answers, strict=True)
    ]


def serve(llm: LLM, visitors: list[Visitor]) -> dict[str, float]:
    """Let them all ask, each in a thread of its own."""
    start = time.perf_counter()
    threads = [threading.Thread(target=visitor.ask, args=(llm, start)) for visitor in visitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(visitor.came) != visitor.tokens for visitor in visitors):
        sys.exit("a request was not answered whole")
    first = [visitor.came[0] - visitor.arrival for visitor in visitors]
    done = [visitor.came[-1] - visitor.arrival for visitor in visitors]
    last, begin = max(visitor.came[-1] for visitor in visitors), min(visitor.arrival for visitor in visitors)
    return {
        "tokens_per_second": sum(visitor.tokens for visitor in visitors) / (last - begin),
        "first_token_s": statistics.median(first),
        "first_token_p95_s": float(np.quantile(first, 0.95)),
        "answer_s": statistics.median(done),
        "answer_p95_s": float(np.quantile(done, 0.95)),
    }


def in_words(report: dict[str, Any]) -> str:
    lines = [f"{report['requests_per_second']:.1f} requests a second"]
    for way, found in report["ways"].items():
        values = (
            f"{name} {one['median']:.4g} ({one['lowest']:.4g} to {one['highest']:.4g})" for name, one in found.items()
        )
        lines.append(f"{way}: " + ", ".join(values))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
