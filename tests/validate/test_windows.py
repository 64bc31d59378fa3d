from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.spec.errors import InputError
from corral.validate.windows import check_windows, cut_windows, encode_alike, read_text, read_token_ids

FakeBuilds = Callable[..., Any]
TABLE = np.zeros((9, 9))


def test_windows_do_not_overlap_and_each_begins_with_bos() -> None:
    assert cut_windows([1, 2, 3, 4, 5], size=3, predictions=99, bos=0) == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert cut_windows([1, 2, 3, 4, 5], size=3, predictions=99, bos=None) == [[1, 2, 3], [4, 5]]


def test_a_bos_that_is_there_is_not_doubled() -> None:
    assert cut_windows([0, 1, 2], size=8, predictions=99, bos=0) == [[0, 1, 2]]


def test_a_last_token_without_prediction_is_left_out() -> None:
    assert cut_windows([1, 2, 3, 4], size=3, predictions=99, bos=None) == [[1, 2, 3]]


@given(st.lists(st.integers(1, 50)), st.integers(2, 9), st.integers(1, 40), st.sampled_from([None, 0]))
def test_windows_give_as_many_predictions_as_wanted(ids: list[int], size: int, wanted: int, bos: int | None) -> None:
    windows = cut_windows(ids, size=size, predictions=wanted, bos=bos)
    assert all(2 <= len(window) <= size for window in windows)
    assert sum(len(window) - 1 for window in windows) <= wanted
    body = [token for window in windows for token in (window if bos is None else window[1:])]
    assert body == ids[: len(body)]
    if bos is not None:
        assert len(body) == min(wanted, len(ids))


def test_short_text_is_refused() -> None:
    with pytest.raises(InputError, match="31 predictions; at least 32 are needed"):
        check_windows([[1] * 32], 9)


def test_token_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match=r"token id 9 is outside the vocabulary \(0 to 8\)"):
        check_windows([[1] * 40 + [9]], 9)


def test_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin1\.txt is not UTF-8 text \(byte 0xef at offset 2\)"):
        read_text(path)


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt cannot be read: No such file"):
        read_text(tmp_path / "none.txt")


def test_token_ids_are_read_from_npy_and_json(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3], dtype=np.uint16))
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    assert read_token_ids(tmp_path / "ids.npy") == read_token_ids(tmp_path / "ids.json") == [1, 2, 3]


@pytest.mark.parametrize("data", [[1.5], {"a": 1}, "text", [True], [[1, 2]]])
def test_other_json_is_no_token_ids(tmp_path: Path, data: Any) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="expected a one-dimensional integer"):
        read_token_ids(tmp_path / "ids.json")


@pytest.mark.parametrize("array", [np.zeros((2, 2), int), np.zeros(3), np.array([{}], dtype=object)])
def test_other_arrays_are_no_token_ids(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match="expected a one-dimensional integer"):
        read_token_ids(tmp_path / "ids.npy")


def test_truncated_npy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(InputError, match="not readable"):
        read_token_ids(tmp_path / "ids.npy")


def test_builds_agree_where_only_one_adds_bos(fake_build: FakeBuilds) -> None:
    a, b, without = (fake_build(name, TABLE) for name in ("a", "b", "without"))
    a.ids, b.ids = [0, 1, 2], [1, 2]
    assert encode_alike("text", [a, without, b]) == [1, 2]


def test_tokenizers_that_differ_are_refused_with_the_place(fake_build: FakeBuilds) -> None:
    a, b = fake_build("a", TABLE), fake_build("b", TABLE)
    a.ids, b.ids = [1, 2, 3, 4], [1, 2, 5, 4]
    with pytest.raises(InputError, match=r"b and a have different tokenizers: from token 2 on, \[5, 4\] and \[3, 4\]"):
        encode_alike("text", [a, b])


def test_one_tokenizer_stopping_early_is_a_difference_at_its_end(fake_build: FakeBuilds) -> None:
    a, b = fake_build("a", TABLE), fake_build("b", TABLE)
    a.ids, b.ids = [1, 2, 3], [1, 2]
    with pytest.raises(InputError, match=r"from token 2 on, \[\] and \[3\]"):
        encode_alike("text", [a, b])


def test_no_tokenizer_at_all_asks_for_ids(fake_build: FakeBuilds) -> None:
    with pytest.raises(InputError, match=r"none of a has a tokenizer\. Give token ids with --token-ids"):
        encode_alike("text", [fake_build("a", TABLE)])
