"""Meta's `tokenizer.model` -> `tokenizer.json`: the same token ids, in the form that the `tokenizers` library runs.

`tokenizer.model` is tiktoken's format: a line a token, its bytes in base64 and its rank, which is its id. Byte-pair
encoding joins the two neighbours whose joint token has the lowest rank, until none is a token. Special tokens follow
after the last rank. All of it, and the pattern that cuts text into words, is from llama-models,
models/llama4/tokenizer.py; that merges in order of rank do the same is what transformers' TikTokenConverter rests on.
"""

from __future__ import annotations

import base64
import binascii
from itertools import chain
from pathlib import Path

from corral.spec.errors import InputError
from corral.spec.meta_params import SPECIAL_TOKENS

BYTES = 64 << 20  # the largest file that is read; the published one has 3.6 MB
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN_OF_TEXT = "<|begin_of_text|>"
ROLES = {"bos_token": BEGIN_OF_TEXT, "eos_token": "<|eot|>"}


def _reserved(group: str, start: int, stop: int) -> list[str]:
    return [f"<|{group}reserved_special_token_{i}|>" for i in range(start, stop)]


NAMED_SPECIAL_TOKENS = (  # in the order of their ids
    BEGIN_OF_TEXT, "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_reserved("text_post_train_", 0, 6),
    "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_reserved("text_post_train_", 8, 69),
    "<|image_start|>", "<|image_end|>", *_reserved("vision_", 0, 2), "<|tile_x_separator|>", "<|tile_y_separator|>",
    *_reserved("vision_", 2, 6), "<|image|>", *_reserved("vision_", 6, 7), "<|patch|>", *_reserved("vision_", 7, 1048),
    *_reserved("reasoning_", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
)  # fmt: skip


def convert_tokenizer(path: Path) -> bytes:
    """The `tokenizer.json` for a `tokenizer.model`. Raises InputError where it is not in tiktoken's format."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = _read_tokens(path)
    vocabulary = {_letters(token): rank for rank, token in enumerate(tokens)}
    # A word that is a token is one, whether or not merges lead to it: tiktoken looks it up first.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(tokens), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*NAMED_SPECIAL_TOKENS, *_reserved("", 0, SPECIAL_TOKENS - len(NAMED_SPECIAL_TOKENS))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    begin = (BEGIN_OF_TEXT, tokenizer.token_to_id(BEGIN_OF_TEXT))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN_OF_TEXT} $A", special_tokens=[begin]),
        ]
    )
    return tokenizer.to_str().encode()


def _read_tokens(path: Path) -> list[bytes]:
    """The tokens by rank."""
    try:
        if path.stat().st_size > BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes; expected at most {BYTES} of a tokenizer.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise InputError(
                    f"{path}, line {number} is not a token in base64 and its rank, as in Meta's tokenizer.model. Put the "
                    "tokenizer.json of the Hugging Face form beside the weights instead."
                ) from None
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if not tokens or [ranks[token] for token in tokens] != list(range(len(tokens))) or b"" in ranks:
        raise InputError(f"{path}: the ranks are not 0, 1, 2, … without gaps: it is damaged. Download it again.")
    return tokens


def _merges(tokens: list[bytes]) -> list[tuple[str, str]]:
    """Every way to put a token together of two, in the order in which byte-pair encoding prefers them."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(rank_of[a], rank_of[b]) for a, b in halves if a in rank_of and b in rank_of]
        merges += [(_letters(tokens[a]), _letters(tokens[b])) for a, b in sorted(known)]
    return merges


def _letters(token: bytes) -> str:
    """Bytes as the printable letters that byte-level tokenizers write for them."""
    return token.decode("latin-1").translate(LETTERS)


def _letter_table() -> dict[int, int]:
    """GPT-2's `bytes_to_unicode`: printable Latin-1 stays, the others follow one another from U+0100."""
    printable = {*chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 0x100 + i for i, byte in enumerate(others)}


LETTERS = _letter_table()
