"""Prompt lookup beside plain decoding: one bundle, the same prompts, by turns in one process.

    python benchmarks/prompt_lookup.py --work /somewhere --json >benchmarks/results/prompt-lookup.json

Without --bundle it is the demo model in int4 for corral's kernels, which is compiled in the work directory once. Prompts are
pieces of the text: to be `completed` as they are, or with the beginning of the piece once more, as where code is `edited` or
quoted and the answer is likely to repeat. Greedy answers must be equal, token by token; otherwise nothing is reported. With
quantized weights that takes kernels whose sums do not depend on how many tokens a step has: elsewhere a near tie may fall
the other way. Tokens a second are of decoding alone, after the first token; the ratio is that of the medians over
`--repeats` rounds, whose order alternates, with the lowest and highest of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corral.runtime import LLM, SamplingParams
from corral.spec.machine import usable_cores

TEXT = Path(__file__).parents[1] / "demo/demo-scout/heldout.txt"
KINDS = {"completed": 0.0, "edited": 0.25}  # how much of a piece is given once more at its end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="For the demo's bundle; used again.")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--piece", type=int, default=256, help="Tokens of the text in each prompt.")
    parser.add_argument("--tokens", type=int, default=128, help="Of each answer.")
    parser.add_argument("--speculative-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from cpu import cpu
    from cpu_shapes import demo_bundle

    bundle = options.bundle or demo_bundle(options.work)
    guess = {"prompt_lookup": True, "num_speculative_tokens": options.speculative_tokens}
    llms = {"plain": LLM(bundle, threads=options.threads), "lookup": LLM(bundle, threads=options.threads, **guess)}
    tokenizer = llms["plain"].tokenizer
    if tokenizer is None:
        sys.exit(f"{bundle} has no tokenizer")
    ids = tokenizer.encode(options.text.read_text())
    kinds = {}
    for kind, repeated in KINDS.items():
        prompts = prompts_of(ids, options.prompts, options.piece, int(repeated * options.piece))
        kinds[kind] = measure(llms, prompts, options.tokens, options.repeats)
    setting = {name: getattr(options, name) for name in ("prompts", "piece", "tokens", "repeats", "threads")}
    report = {"prompts": kinds, "setting": setting, "machine": cpu()}
    print(json.dumps(report, indent=1) if options.json else in_words(kinds))


def measure(llms: dict[str, LLM], prompts: list[list[int]], tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of each way by turns, and their ratio. Exits where answers differ."""
    rates: dict[str, list[float]] = {name: [] for name in llms}
    answers: list[tuple[int, ...]] = []  # plain ones, which come first
    for turn in range(1 + repeats):  # the first round only warms up
        for name, llm in list(llms.items())[:: -1 if turn % 2 else 1]:
            found, rate = run(llm, prompts, tokens)
            answers = answers or found
            if wrong := sum(a != b for a, b in zip(answers, found, strict=True)):
                sys.exit(f"{wrong} answers of {name} differ: no figure would mean anything")
            rates[name] += [rate] if turn else []
    ratios = [lookup / plain for plain, lookup in zip(rates["plain"], rates["lookup"], strict=True)]
    return {
        "ratio": statistics.median(rates["lookup"]) / statistics.median(rates["plain"]),
        "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "equal_answers": len(answers),
    }


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


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def in_words(kinds: dict[str, Any]) -> str:
    lines = []
    for kind, found in kinds.items():
        lowest, highest = found["ratio_range"]
        lines.append(
            f"{kind}: {found['ratio']:.2f} times as fast (rounds: {lowest:.2f} to {highest:.2f}), equal answers"
        )
        for name, rates in found["tokens_per_second"].items():
            lines.append(
                f"    {name}: {rates['median']:.0f} tokens/s ({rates['lowest']:.0f} to {rates['highest']:.0f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
