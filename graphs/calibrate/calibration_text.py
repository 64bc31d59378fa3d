"""A recipe's calibration text as windows of token ids, the same for every run, and the name of all that follows from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.identity import checkpoint_identity
from corral.model.checkpoint.synthetic import is_synthetic
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe

WINDOW = 512  # tokens; each starts without context, as in `corral validate`
SHIPPED = {"python-library": Path(__file__).with_name("python-library.txt")}
# No tokenizer averages as many characters a token: of a long text, no more is encoded than is used.
MOST_CHARACTERS = 64
FORMAT = "3"  # of what is gathered; part of its name


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [windows, window], what the text is called, and its SHA-256 ("" where the ids are made up)."""

    ids: NDArray[np.int64]
    name: str
    sha256: str

    def key(self, checkpoint: Checkpoint, settings: str) -> str:
        """Name by content what this text shows of a checkpoint: 16 hexadecimal digits. `settings`: what is gathered."""
        digest = hashlib.sha256(f"{FORMAT} {checkpoint_identity(checkpoint)} {self.ids.shape} {settings}".encode())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()[:16]


def read_calibration_text(checkpoint: Checkpoint, recipe: Recipe) -> CalibrationText:
    """The first whole windows of the recipe's text, at most `calibration_tokens`; fewer where the text is shorter.

    Raises InputError where the text cannot be read, gives no window, or the checkpoint has no tokenizer. A synthetic
    checkpoint has none, and no text would mean anything to it: its ids are drawn at random, the same for every run.
    """
    count = recipe.calibration_tokens // WINDOW
    if is_synthetic(checkpoint.directory):
        ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (count, WINDOW))
        return CalibrationText(ids, "random token ids", "")
    path = SHIPPED.get(recipe.calibration, Path(recipe.calibration))
    data = _read(path, recipe.calibration)
    ids = np.asarray(_encode(checkpoint, data.decode()[: recipe.calibration_tokens * MOST_CHARACTERS]), np.int64)
    front = [] if checkpoint.config.bos_token_id is None else [checkpoint.config.bos_token_id]
    size = WINDOW - len(front)
    count = min(count, len(ids) // size)
    if not count:
        raise InputError(
            f"the calibration text {path} gives {len(ids)} tokens, expected at least {size}: one window, and some ten "
            "thousand for statistics worth having. Give a longer text with --calibration FILE."
        )
    windows = ids[: count * size].reshape(count, size)
    if front:
        windows = np.insert(windows, 0, front[0], axis=1)
    return CalibrationText(windows, path.name, hashlib.sha256(data).hexdigest())


def _read(path: Path, asked: str) -> bytes:
    try:
        data = path.read_bytes()
        data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte at offset {error.start}). Convert it.") from None
    except OSError as error:
        raise InputError(
            f'calibration "{asked}" cannot be read ({error.strerror}); expected a UTF-8 text file, or one of those that '
            f"corral ships: {', '.join(SHIPPED)}."
        ) from None
    return data


def _encode(checkpoint: Checkpoint, text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise InputError(
            f"{checkpoint.directory} has no tokenizer.json, which a calibration text needs. Copy the model's there, or use "
            "--weights int4 with --method rtn or hqq, which need no text."
        )
    return Tokenizer.from_buffer(tokenizer).encode(text, add_special_tokens=False).ids
