"""A text (or token ids) -> the windows that every build is scored on, the same for all.

Windows do not overlap and start afresh: the first token of each has no context but the beginning-of-text token, where
the tokenizer has one. A window of n tokens gives n - 1 predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corral.spec.errors import InputError
from corral.validate.build import Build

LEAST_PREDICTIONS = 32  # fewer say nothing about a distribution
SHOWN = 8  # token ids around a disagreement


def read_text(path: Path) -> str:
    """Read a UTF-8 text file. Raises InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start}). "
            "Convert it, or give token ids with --token-ids FILE."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Give a text file with --text FILE.") from None


def read_token_ids(path: Path) -> list[int]:
    """Read token ids from a one-dimensional integer `.npy`, or a JSON list. Raises InputError where it is neither."""
    expected = "expected a one-dimensional integer .npy or a JSON list of token ids"
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise InputError(f"{path} holds {array.dtype}{list(array.shape)}; {expected}.")
            ids = array.tolist()
        else:
            ids = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; {expected}.") from None
    except (ValueError, EOFError, RecursionError) as error:
        raise InputError(f"{path} is not readable ({str(error)[:120]}); {expected}.") from None
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise InputError(f"{path} holds something else than a list of integers; {expected}.")
    return ids


def encode_alike(text: str, builds: Sequence[Build]) -> list[int]:
    """Token ids of `text`, on which every build with a tokenizer must agree; a leading beginning-of-text is dropped.

    Raises InputError where no build has a tokenizer, or two disagree.
    """
    encoded = [(build, ids) for build in builds if (ids := build.encode(text)) is not None]
    if not encoded:
        names = ", ".join(build.name for build in builds)
        raise InputError(f"none of {names} has a tokenizer. Give token ids with --token-ids FILE (.npy or .json).")
    first, expected = encoded[0][0], _without_bos(encoded[0][1], encoded[0][0])
    for build, with_bos in encoded[1:]:
        ids = _without_bos(with_bos, build)
        if ids != expected:
            differ = (i for i, (ours, theirs) in enumerate(zip(ids, expected, strict=False)) if ours != theirs)
            at = next(differ, min(len(ids), len(expected)))
            raise InputError(
                f"{build.name} and {first.name} have different tokenizers: from token {at} on, {ids[at : at + SHOWN]} "
                f"and {expected[at : at + SHOWN]}. Only builds of the same checkpoint can be compared; compile the "
                f"checkpoint of {first.name} again."
            )
    return expected


def cut_windows(token_ids: Sequence[int], *, size: int, predictions: int, bos: int | None) -> list[list[int]]:
    """Cut ids into windows of `size` tokens, `bos` in front of each, that give at most `predictions` predictions."""
    ids = list(token_ids[1:] if bos is not None and token_ids and token_ids[0] == bos else token_ids)
    front = [] if bos is None else [bos]
    windows, left, start = [], predictions, 0
    while left > 0 and start < len(ids):
        # One prediction fewer than tokens: the first token of a window is only context.
        window = [*front, *ids[start : start + size - len(front)]][: left + 1]
        start += size - len(front)
        if len(window) > 1:
            windows.append(window)
            left -= len(window) - 1
    return windows


def check_windows(windows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse too little to measure on, and ids that the model does not have."""
    count = sum(len(window) - 1 for window in windows)
    if count < LEAST_PREDICTIONS:
        raise InputError(
            f"the text gives {count} predictions; at least {LEAST_PREDICTIONS} are needed, and some thousands for a "
            "standard error worth having. Give a longer text."
        )
    for window in windows:
        for token in window:
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"token id {token} is outside the vocabulary (0 to {vocab_size - 1}). The ids belong to another "
                    "tokenizer; encode the text with the model's own."
                )


def _without_bos(ids: list[int], build: Build) -> list[int]:
    return ids[1:] if ids and ids[0] == build.config.bos_token_id else ids
