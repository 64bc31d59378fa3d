"""Text out of tokens: characters that span tokens, and stop strings that do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corral.runtime.stop_strings import StopStrings
from corral.runtime.stream_decoder import StreamDecoder


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(data: bytes) -> list[str]:
    decoder = StreamDecoder(decode_bytes)
    return [*(decoder.push(byte) for byte in data), decoder.flush()]


@given(st.text())
def test_pieces_of_any_text_join_to_it_and_hold_whole_characters(text: str) -> None:
    streamed = pieces(text.encode())
    assert "".join(streamed) == text
    assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in streamed)


@given(st.binary(max_size=60))
def test_pieces_of_any_bytes_join_to_their_decoding(data: bytes) -> None:
    assert "".join(pieces(data)) == decode_bytes(data)


def test_an_emoji_comes_whole() -> None:
    assert pieces("a🦙b".encode()) == ["a", "", "", "", "🦙", "b", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    assert pieces("a🦙".encode()[:-1]) == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


@given(st.text(max_size=40))
def test_a_real_byte_level_tokenizer_streams_alike(tokenizer_json: str, text: str) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    decoder = StreamDecoder(tokenizer.decode)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join([*(decoder.push(i) for i in ids), decoder.flush()]) == tokenizer.decode(ids)


def test_skipped_tokens_give_no_text_and_do_not_break_a_character() -> None:
    decoder = StreamDecoder(decode_bytes, skip={0})
    assert [decoder.push(i) for i in (0xC3, 0, 0xA9)] == ["", "", "é"]


@given(st.binary(max_size=60))
def test_the_whole_text_is_that_of_the_pieces(data: bytes) -> None:
    decoder = StreamDecoder(decode_bytes, skip={0})
    assert decoder.whole(data) == "".join([*(decoder.push(byte) for byte in data), decoder.flush()])


def run(stop: Sequence[str], parts: Sequence[str]) -> tuple[list[str], bool]:
    stops = StopStrings(stop)
    return [*(stops.push(part) for part in parts), stops.flush()], stops.found


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=40),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    parts, rest = [], text
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    shown, found = run(stop, [*parts, rest])
    # Generation ends with the first part that completes a stop string; what was there by then is cut at the earliest.
    seen = ""
    for part in [*parts, rest]:
        seen += part
        if starts := [seen.find(s) for s in stop if s in seen]:
            assert found
            assert "".join(shown) == seen[: min(starts)]
            return
    assert not found
    assert "".join(shown) == text


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (["x", "<", "end", ">", "y"], ["x", "", "", "", "", ""]),
        (["x<en", "d!"], ["x", "<end!", ""]),
        (["<<e", "nd>"], ["<", "", ""]),
        (["x<end"], ["x", "<end"]),
    ],
)
def test_what_may_start_a_stop_string_is_held_back(parts: list[str], shown: list[str]) -> None:
    assert run(["<end>"], parts)[0] == shown
