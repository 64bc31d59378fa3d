"""Tokenizer, chat template, special tokens and end-of-sequence ids, in the places where checkpoints keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.tokenizer_files import (
    read_chat_template,
    read_eos_token_ids,
    read_special_tokens,
    read_tokenizer,
)
from corral.spec.errors import InputError


def test_a_checkpoint_has_all_of_them(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("scout"))
    assert checkpoint.tokenizer() == (tiny_checkpoint("scout") / "tokenizer.json").read_bytes()
    assert "header_start" in (checkpoint.chat_template() or "")
    assert checkpoint.special_tokens() == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    assert checkpoint.eos_token_ids == (257, 258)


def test_none_of_them_is_needed(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    assert read_chat_template(tmp_path) is None
    assert read_special_tokens(tmp_path) == {}
    assert read_eos_token_ids(tmp_path) == ()


def test_the_template_is_found_where_it_lies(tmp_path: Path, edit_json: Callable[..., None]) -> None:
    edit_json(tmp_path / "tokenizer_config.json", chat_template="in the config")
    assert read_chat_template(tmp_path) == "in the config"
    edit_json(tmp_path / "chat_template.json", chat_template="in json")
    assert read_chat_template(tmp_path) == "in json"
    (tmp_path / "chat_template.jinja").write_text("in jinja")
    assert read_chat_template(tmp_path) == "in jinja"


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not readable UTF-8 text"):
        read_chat_template(tmp_path)


def test_of_named_templates_the_default_counts(tmp_path: Path, edit_json: Callable[..., None]) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert read_chat_template(tmp_path) == "plain"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=3)
    with pytest.raises(InputError, match="chat_template is a JSON int, expected a string"):
        read_chat_template(tmp_path)


def test_special_tokens_as_strings_and_objects(tmp_path: Path, edit_json: Callable[..., None]) -> None:
    edit_json(tmp_path / "special_tokens_map.json", bos_token={"content": "<b>", "lstrip": False}, pad_token="<p>")
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<B>", eos_token=None, add_bos_token=True, model_max=3)
    assert read_special_tokens(tmp_path) == {"bos_token": "<B>", "pad_token": "<p>"}


def test_eos_ids_are_merged(scout_copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(scout_copy / "generation_config.json", eos_token_id=[300, 258])
    assert open_checkpoint(scout_copy).eos_token_ids == (300, 258, 257)
    edit_json(scout_copy / "generation_config.json", eos_token_id=300)
    assert open_checkpoint(scout_copy).eos_token_ids == (300, 257, 258)


@pytest.mark.parametrize("value", ["</s>", [1, -2], [True], {"a": 1}])
def test_eos_ids_that_are_none(tmp_path: Path, edit_json: Callable[..., None], value: object) -> None:
    edit_json(tmp_path / "generation_config.json", eos_token_id=value)
    with pytest.raises(InputError, match="expected a token id or a list of them"):
        read_eos_token_ids(tmp_path)
