"""tokenizer.model -> tokenizer.json: the same ids as byte-pair encoding by rank, written out here."""

from __future__ import annotations

import base64
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corral.model.checkpoint.meta_tokenizer import NAMED_SPECIAL_TOKENS, PATTERN, convert_tokenizer
from corral.model.checkpoint.tokenizer_files import read_special_tokens, read_tokenizer
from corral.spec.errors import InputError

TEXT = Path(__file__).read_text(encoding="utf-8").replace("<|", "<")  # no special tokens


def train(text: str, merges: int) -> list[bytes]:
    """Tokens by rank: the bytes in a shuffled order, then the most frequent pair of each round."""
    tokens = [bytes([byte]) for byte in random.Random(0).sample(range(256), 256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(PATTERN, text)]
    for _ in range(merges):
        pairs: dict[bytes, int] = {}
        for word in words:
            for a, b in pairwise(word):
                pairs[a + b] = pairs.get(a + b, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best)
        words = [_join(word, best) for word in words]
    return tokens


def _join(word: list[bytes], token: bytes) -> list[bytes]:
    i, joined = 0, []
    while i < len(word):
        take = 2 if i + 1 < len(word) and word[i] + word[i + 1] == token else 1
        joined.append(b"".join(word[i : i + take]))
        i += take
    return joined


def encode(text: str, rank_of: dict[bytes, int]) -> list[int]:
    """As tiktoken does: a word that is a token is one; else the pair of lowest rank is joined, the leftmost first."""
    ids = []
    for word in regex.findall(PATTERN, text):
        parts = [word.encode()] if word.encode() in rank_of else [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(rank_of[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank_of]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank_of[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate(train(TEXT, 150))}


@pytest.fixture(scope="module")
def directory(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    directory = tmp_path_factory.mktemp("meta")
    (directory / "tokenizer.model").write_bytes(b"".join(lines))
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_buffer(convert_tokenizer(directory / "tokenizer.model"))


@settings(deadline=None, max_examples=150)
@given(text=st.one_of(st.text(), st.text("abdefhinorst _(=\n'", max_size=80), st.just(TEXT)))
def test_ids_and_text(text: str, tokenizer: Tokenizer, ranks: dict[bytes, int]) -> None:
    assume("<|" not in text)  # special tokens
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == encode(text, ranks)
    assert tokenizer.decode(ids) == text


def test_special_tokens_follow_the_last_rank(tokenizer: Tokenizer, directory: Path) -> None:
    first = 256 + 150
    assert tokenizer.get_vocab_size() == first + 2048
    # Their places in models/llama4/tokenizer.py, whose own comments give these for 200000 ranks.
    places = {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|header_start|>": 5, "<|eom|>": 7, "<|eot|>": 8,
        "<|finetune_right_pad|>": 18, "<|image_start|>": 80, "<|image|>": 90, "<|patch|>": 92,
        "<|reasoning_reserved_special_token_0|>": 1134, "<|reserved_special_token_0|>": 1144,
    }  # fmt: skip
    assert {name: tokenizer.token_to_id(name) for name in places} == {name: first + n for name, n in places.items()}
    assert len(set(NAMED_SPECIAL_TOKENS)) == 1144
    assert tokenizer.encode("a").ids[0] == first
    assert tokenizer.encode("<|eot|>", add_special_tokens=False).ids == [first + 8]
    assert read_special_tokens(directory)["bos_token"] == "<|begin_of_text|>"


def test_a_tokenizer_json_wins(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert read_tokenizer(tmp_path) == b"{}"
    assert read_special_tokens(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x0e\x0a\x05<unk>", r"line 1|line 2"),
        (b"YQ== 0\nYg==\n", "line 2 is not a token in base64 and its rank"),
        (b"YQ== 0\nY! 1\n", "line 2 is not"),
        (b"YQ== 0\nYg== 2\n", "the ranks are not 0, 1, 2"),
        (b"YQ== 0\nYQ== 1\n", "the ranks are not 0, 1, 2"),
        (b"", "the ranks are not 0, 1, 2"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tokenizer(tmp_path)
