"""Does a model find a word again that it read N attention chunks ago? A needle in a haystack, for small models of code.

    corral compile demo/demo-scout -o /tmp/demo-fp32 --weights fp32
    python benchmarks/needle.py /tmp/demo-fp32 --text demo/demo-scout/heldout.txt --json

The haystack is the text; the needle, a line that gives a name one of WORDS, stands so many tokens before the end; the end
gives the same name again, and its value is what the model must say next. Told are the rank and the log probability of the
needle's word, with the needle and with the text as it was: what the needle is worth is their difference. The first distance
lies within a chunk, to show that the question can be answered at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corral.runtime import LLM, SamplingParams

WORDS = ("name", "key", "value", "path", "line", "text", "data", "size", "index", "result", "type", "item")
NEEDLE = "\n    secret = {word}\n"
QUESTION = "\n    secret ="
NEAR = 0.25  # of a chunk: within one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=float, action="append", help="Distance; may be given several times.")
    parser.add_argument("--trials", type=int, default=48, help="Words and places of the haystack, for each distance.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    llm = LLM(options.bundle, threads=options.threads)
    chunk = llm.config.attention_chunk_size
    if llm.tokenizer is None or chunk is None:
        sys.exit(f"{options.bundle} has no tokenizer or no attention chunks")
    ids, question = (
        llm.tokenizer.encode(text, add_special_tokens=False) for text in (options.text.read_text(), QUESTION)
    )
    needles = [llm.tokenizer.encode(NEEDLE.format(word=word), add_special_tokens=False) for word in WORDS]
    assert all(needle[: len(question)] == question for needle in needles), "a needle must begin like the question"
    report = []
    for chunks in options.chunks or [NEAR, 1, 2, 8, 32]:
        rng, found, distance = np.random.default_rng(0), [], int(chunks * chunk)
        before = chunk - (distance + len(question)) % chunk  # so that the question ends at a chunk's end
        for trial in range(options.trials):
            needle = needles[trial % len(needles)]
            first = int(rng.integers(0, len(ids) - before - distance))
            text = ids[first : first + before + distance]
            prompts = ([*text[:before], *needle, *text[before + len(needle) :], *question], [*text, *question])
            found.append([rank_and_logprob(llm, prompt, needle[len(question)]) for prompt in prompts])
        report.append({"chunks": chunks, "tokens": distance, **summary(found)})
    print(json.dumps({"trials": options.trials, "distances": report}, indent=1) if options.json else in_words(report))


def rank_and_logprob(llm: LLM, prompt: Sequence[int], token: int) -> tuple[int, float]:
    """Of `token` as the next one; rank 1 is the likeliest."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=llm.config.vocab_size)
    [answer] = llm.generate([list(prompt)], params)
    assert answer.logprobs
    for rank, (found, logprob) in enumerate(answer.logprobs[0].top, 1):
        if found == token:
            return rank, logprob
    raise AssertionError("every token has a rank")


def summary(found: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Any]:
    """Of trials, each with and without the needle."""
    gains = [with_needle[1] - without[1] for with_needle, without in found]
    return {
        "first": {
            name: sum(one[i][0] == 1 for one in found) / len(found) for i, name in enumerate(("with", "without"))
        },
        "median_rank": {
            name: statistics.median(one[i][0] for one in found) for i, name in enumerate(("with", "without"))
        },
        "gain_nats": {
            "mean": statistics.mean(gains),
            "standard_error": statistics.stdev(gains) / len(gains) ** 0.5,
        },
    }


def in_words(report: Sequence[dict[str, Any]]) -> str:
    lines = []
    for one in report:
        gain = one["gain_nats"]
        lines.append(
            f"{one['chunks']:5g} chunks ({one['tokens']} tokens): first in {one['first']['with']:.0%} of the trials, without "
            f"the needle {one['first']['without']:.0%}; median rank {one['median_rank']['with']:g}, without "
            f"{one['median_rank']['without']:g}; {gain['mean']:+.2f} nats (standard error {gain['standard_error']:.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
