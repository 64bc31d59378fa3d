"""What lies beside the weights: tokenizer, chat template, special tokens, end-of-sequence ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corral.model.checkpoint import meta_tokenizer
from corral.model.checkpoint.json_file import read_json
from corral.spec.errors import InputError

TOKENIZER_NAME, META_TOKENIZER_NAME = "tokenizer.json", "tokenizer.model"
# Later files win.
SPECIAL_TOKEN_FILES = ("special_tokens_map.json", "tokenizer_config.json")
# Earlier files win.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def read_tokenizer(directory: Path) -> bytes | None:
    """The `tokenizer.json` of a checkpoint, made of Meta's `tokenizer.model` where only that is there; None without."""
    path = directory / TOKENIZER_NAME
    if path.is_file():
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    return meta_tokenizer.convert_tokenizer(path.with_name(META_TOKENIZER_NAME)) if _only_metas(directory) else None


def read_chat_template(directory: Path) -> str | None:
    """The Jinja source of the chat template; of several named ones, "default"."""
    for name in TEMPLATE_FILES:
        path = directory / name
        if not path.is_file():
            continue
        template = _read_text(path) if path.suffix == ".jinja" else _template_in(path)
        if template is not None:
            return template
    return None


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Role -> token: {"bos_token": "<|begin_of_text|>", …}."""
    tokens = dict(meta_tokenizer.ROLES) if _only_metas(directory) else {}
    for name in SPECIAL_TOKEN_FILES:
        for role, value in _read_if_there(directory / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(content, str):
                tokens[role] = content
    return tokens


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The ids at which generation stops, according to `generation_config.json`."""
    path = directory / "generation_config.json"
    value = _read_if_there(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise InputError(f"{path}: eos_token_id is {str(value)[:80]}, expected a token id or a list of them.")
    return tuple(ids)


def _only_metas(directory: Path) -> bool:
    return (directory / META_TOKENIZER_NAME).is_file() and not (directory / TOKENIZER_NAME).is_file()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable UTF-8 text: {error}. Download it again.") from None


def _template_in(path: Path) -> str | None:
    value = read_json(path).get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise InputError(f"{path}: chat_template is a JSON {type(value).__name__}, expected a string.")
    return value


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
