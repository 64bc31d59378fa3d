"""compare(reference, candidates, texts) -> Report: open the builds, check that they are comparable, measure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from corral.spec.errors import InputError
from corral.spec.machine import usable_cores
from corral.spec.progress import Progress, silent
from corral.validate import latency
from corral.validate.accuracy import measure_accuracy
from corral.validate.build import Build, open_build
from corral.validate.greedy import measure_greedy
from corral.validate.insides import look_into
from corral.validate.latency import measure_latency
from corral.validate.layers import LayerByLayer, measure_layers
from corral.validate.report import CandidateResult, Measured, ReferenceResult, Report
from corral.validate.verdict import locate
from corral.validate.windows import check_windows, cut_windows, encode_alike

PREDICTIONS = 20_000
WINDOW = 512  # tokens
# No tokenizer averages as many characters a token: of a long text, no more is encoded than can be scored.
MOST_CHARACTERS = 64

StrPath = str | os.PathLike[str]


def compare(
    reference: StrPath,
    candidates: Sequence[StrPath],
    texts: Sequence[str] = (),
    *,
    token_ids: Sequence[int] | None = None,
    predictions: int = PREDICTIONS,
    window: int = WINDOW,
    repeats: int = latency.REPEATS,
    prompt_tokens: int = latency.PROMPT_TOKENS,
    decode_tokens: int = latency.DECODE_TOKENS,
    provider: str = "cpu",
    threads: int | None = None,
    inside: bool = False,
    progress: Progress = silent,
) -> Report:
    """Measure what each candidate lost against the reference, on the same text, and how fast each build is.

    `reference` is a checkpoint (then the PyTorch model in float32 is the truth) or a bundle; candidates are builds of
    the same model. At most `predictions` tokens of `texts` (or `token_ids`) are scored, in windows of `window` tokens.
    With `inside` the first of these windows are run once more, to hold the builds against each other layer by layer.
    Raises InputError where builds cannot be compared, and CheckFailed where logits are not finite.
    """
    _check_numbers(candidates, window, predictions, repeats, prompt_tokens, decode_tokens)
    paths = [Path(reference), *map(Path, candidates)]
    builds = []
    for done, path in enumerate(paths):
        progress("open", done, len(paths), "builds")
        builds.append(open_build(path, provider=provider, threads=threads, progress=progress))
    progress("open", len(paths), len(paths), "builds")
    check_comparable(builds, max(window, prompt_tokens + decode_tokens))
    windows = list(_windows(builds, texts, token_ids, window, predictions))
    check_windows(windows, builds[0].config.vocab_size)

    perplexity, accuracies = measure_accuracy(builds[0], builds[1:], windows, progress=progress)
    # The longest window: a text shorter than the prompt gives a shorter prompt.
    prompt = max(windows, key=len)[:prompt_tokens]
    latencies = measure_latency(builds, prompt, tokens=decode_tokens, repeats=repeats, progress=progress)
    greedy = measure_greedy(
        builds[0], builds[1:], windows, prompt_tokens=len(prompt), tokens=decode_tokens, progress=progress
    )
    insides: list[LayerByLayer | None] = [None for _ in candidates]
    if inside:
        how: dict[str, Any] = {"provider": provider, "threads": threads}
        look = look_into(paths[0], **how)
        insides = [
            measure_layers(look, look_into(path, **how), builds[0].config, windows, progress=progress)
            for path in paths[1:]
        ]
    return Report(
        reference=ReferenceResult(
            name=builds[0].name,
            kind=builds[0].kind,
            bytes=builds[0].bytes,
            perplexity=perplexity,
            latency=latencies[0],
        ),
        candidates=tuple(
            CandidateResult(
                name=build.name,
                bytes=build.bytes,
                accuracy=accuracy,
                latency=speed,
                greedy=text,
                insides=found,
                verdict=locate(found, builds[0].config) if found else None,
            )
            for build, accuracy, speed, text, found in zip(
                builds[1:], accuracies, latencies[1:], greedy, insides, strict=True
            )
        ),
        measured=Measured(
            predictions=sum(len(w) - 1 for w in windows),
            windows=len(windows),
            window=window,
            prompt_tokens=len(prompt),
            decode_tokens=decode_tokens,
            repeats=repeats,
            threads=threads or usable_cores(),
            provider=provider,
        ),
    )


def check_comparable(builds: Sequence[Build], context: int) -> None:
    """Refuse builds of other models than the reference's, and more context than the model has."""
    reference = builds[0]
    for build in builds[1:]:
        ours, theirs = build.config.vocab_size, reference.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"{build.name} has a vocabulary of {ours} tokens and {reference.name} one of {theirs}; only builds of "
                f"the same checkpoint can be compared. Compile the checkpoint of {reference.name} again."
            )
    most = reference.config.max_position_embeddings
    if context > most:
        raise InputError(
            f"a window (or a timed run) takes {context} tokens, and the model has at most {most}. "
            f"Give a smaller --window, at most {most}."
        )


def _windows(
    builds: Sequence[Build], texts: Sequence[str], token_ids: Sequence[int] | None, size: int, predictions: int
) -> Iterator[list[int]]:
    """Windows of every text in turn, or of the token ids, until there are enough predictions."""
    bos = builds[0].config.bos_token_id
    if token_ids is not None:
        # Ids are taken as they are: only who put a beginning-of-text token in front wants one before each window.
        first = token_ids[0] if len(token_ids) else None
        yield from cut_windows(token_ids, size=size, predictions=predictions, bos=bos if first == bos else None)
        return
    for text in texts:
        ids = encode_alike(text[: predictions * MOST_CHARACTERS], builds) if predictions > 0 else []
        for window in cut_windows(ids, size=size, predictions=predictions, bos=bos):
            predictions -= len(window) - 1
            yield window


def _check_numbers(
    candidates: Sequence[StrPath], window: int, predictions: int, repeats: int, prompt_tokens: int, decode_tokens: int
) -> None:
    if not candidates:
        raise InputError("there is no candidate to compare; expected at least one bundle besides the reference.")
    least = {
        "window": (window, 2),
        "tokens": (predictions, 1),
        "repeats": (repeats, 1),
        "prompt_tokens": (prompt_tokens, 1),
        "decode_tokens": (decode_tokens, 2),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise InputError(f"{name} is {value}, expected at least {smallest}.")
