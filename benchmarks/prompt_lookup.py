"""Prompt lookup beside plain decoding: one bundle, the same prompts, by turns in one process.

    python benchmarks/prompt_lookup.py BUNDLE --text demo/demo-scout/heldout.txt --json

Each prompt is a piece of the text and the beginning of the same piece once more, as where code is edited or quoted: the
answer is likely to repeat. `--once` takes each piece alone, which is the harder case. Greedy answers must be equal, token
by token; otherwise nothing is reported. With quantized weights that takes kernels whose sums do not depend on how many
tokens a step has: elsewhere a near tie may fall the other way. Tokens a second are of decoding alone, after the first
token; the ratio is that of the medians over `--repeats` rounds, whose order alternates, with the lowest and highest of a
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from corral.runtime import LLM, SamplingParams

REPEATED = 0.25  # of a piece, given once more at its end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--piece", type=int, default=256, help="Tokens of the text in each prompt.")
    parser.add_argument("--tokens", type=int, default=128, help="Of each answer.")
    parser.add_argument("--speculative-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plain = LLM(options.bundle, threads=options.threads)
    guessing = LLM(
        options.bundle,
        threads=options.threads,
        prompt_lookup=True,
        num_speculative_tokens=options.speculative_tokens,
    )
    assert plain.tokenizer is not None
    ids = plain.tokenizer.encode(options.text.read_text())
    prompts = prompts_of(ids, options.prompts, options.piece, 0 if options.once else int(REPEATED * options.piece))
    rates: dict[str, list[float]] = {"plain": [], "lookup": []}
    answers: dict[str, list[tuple[int, ...]]] = {}  # plain ones, which come first
    for turn in range(1 + options.repeats):  # the first round only warms up
        for name, llm in (("plain", plain), ("lookup", guessing))[:: -1 if turn % 2 else 1]:
            found, rate = run(llm, prompts, options.tokens)
            if answers.setdefault("plain", found) != found:
                sys.exit(
                    f"{different(answers['plain'], found)} answers of {name} differ: no figure would mean anything"
                )
            rates[name] += [rate] if turn else []
    report = {
        "ratio": statistics.median(rates["lookup"]) / statistics.median(rates["plain"]),
        "ratio_range": [f(b / a for a, b in zip(rates["plain"], rates["lookup"], strict=True)) for f in (min, max)],
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "setting": {name: str(value) for name, value in vars(options).items()},
    }
    print(json.dumps(report, indent=1) if options.json else in_words(report))


def prompts_of(ids: list[int], count: int, piece: int, repeated: int) -> list[list[int]]:
    """`count` pieces spread over the text, each with its first `repeated` tokens once more."""
    if len(ids) < count * piece:
        sys.exit(f"the text has {len(ids)} tokens, expected at least {count * piece}")
    starts = [n * (len(ids) - piece) // max(count - 1, 1) for n in range(count)]
    return [[*ids[s : s + piece], *ids[s : s + repeated]] for s in starts]


def run(llm: LLM, prompts: list[list[int]], tokens: int) -> tuple[list[tuple[int, ...]], float]:
    """The answers, one prompt after the other, and tokens a second of decoding them."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    done = [llm.generate([prompt], params)[0] for prompt in prompts]
    seconds = sum(one.timings.total - one.timings.first_token for one in done)
    return [one.token_ids for one in done], sum(len(one.token_ids) - 1 for one in done) / seconds


def different(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def in_words(report: dict[str, object]) -> str:
    lowest, highest = report["ratio_range"]  # type: ignore[misc]
    lines = [f"prompt lookup decodes {report['ratio']:.2f} times as fast (rounds: {lowest:.2f} to {highest:.2f})"]
    for name, values in report["tokens_per_second"].items():  # type: ignore[attr-defined]
        lines.append(f"{name}: {values['median']:.0f} tokens/s ({values['lowest']:.0f} to {values['highest']:.0f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
