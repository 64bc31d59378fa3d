"""Text <-> token ids with the bundle's `tokenizer.json`, and conversations -> token ids with its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from corral.runtime.chat import Message, check_messages
from corral.runtime.stream_decoder import StreamDecoder
from corral.spec.bundle import Bundle
from corral.spec.errors import InputError

if TYPE_CHECKING:
    from corral.runtime.chat_template import ChatTemplate

# Noncharacters: valid in a string, never text.
MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Tokenizer:
    """A tokenizer file with an optional chat template, which is opened when messages first ask for it."""

    def __init__(self, path: Path, open_template: Callable[[], ChatTemplate] | None = None) -> None:
        self._path, self._open_template = path, open_template
        self._tokenizer = _load(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's spelling and id, special ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens` as the tokenizer's post-processor wants them (a BOS in front).

        Special tokens spelled in the text become control tokens, as everywhere; `apply_chat_template` is the safe way.
        """
        return self._encode(self._tokenizer, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        try:
            return self._tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError, ValueError) as error:
            raise InputError(f"these token ids cannot be decoded: {error}. Expected integers of at least 0.") from None

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one sequence's tokens as they come; special tokens give no text."""
        return StreamDecoder(self.decode, frozenset(self.special_tokens.values()))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation, ready for the model to answer; `variables` (tools, …) go to the template.

        Special tokens that somebody wrote *into a message* stay text and cannot end their turn or pose as another role.
        """
        if self._open_template is None:
            raise InputError(
                f"{self._path.parent} has no chat template, so messages cannot become a prompt. "
                "Use generate() with a text prompt, or compile a checkpoint that has a chat template (an Instruct one)."
            )
        check_messages(messages)
        marker = next((m for m in MARKERS if not any(m in text for text in _strings(messages))), None)
        if marker is None:
            raise InputError(f"the messages use all of the noncharacters U+FDD0 to U+FDEF; remove one of {MARKERS!r}.")
        guarded = _map_strings(messages, lambda text: self._guard(text, marker))
        marked = self._template.render(guarded, add_generation_prompt=add_generation_prompt, **variables)
        text = marked.replace(marker, "")
        # The template writes BOS itself, so the post-processor must not add another one.
        if len(self._special.findall(marked)) == len(self._special.findall(text)):
            return self._encode(self._tokenizer, text, add_special_tokens=False)
        return self._encode_marked(marked, marker)

    def _guard(self, text: str, marker: str) -> str:
        """Put `marker` after every character that a special token can start with, so that none can begin in `text`."""
        return re.sub(f"([{self._special_starts}])", rf"\1{marker}", text) if self._special_starts else text

    def _encode_marked(self, marked: str, marker: str) -> list[int]:
        ids: list[int] = []
        for piece in self._special.split(marked):
            if piece in self.special_tokens:
                ids.append(self.special_tokens[piece])
            elif plain := piece.replace(marker, ""):
                ids += self._encode(self._plain_tokenizer, plain, add_special_tokens=False)
        return ids

    @cached_property
    def _template(self) -> ChatTemplate:
        assert self._open_template
        return self._open_template()

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")

    @cached_property
    def _special_starts(self) -> str:
        return "".join(sorted({re.escape(token[0]) for token in self.special_tokens}))

    @cached_property
    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """A second copy that reads special tokens as ordinary text; needed only for messages that contain some."""
        plain = _load(self._path)
        plain.encode_special_tokens = True
        return plain

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"text to encode is a {type(text).__name__}, expected a string.")
        try:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:  # lone surrogates
            raise InputError(f"text cannot be encoded as UTF-8: {error}. Remove the lone surrogates.") from None


def open_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer, with its chat template if it has one; None for a bundle without a tokenizer."""
    manifest = bundle.manifest
    if manifest.tokenizer is None:
        return None
    open_template = partial(_open_template, bundle) if manifest.chat_template is not None else None
    return Tokenizer(bundle.path(manifest.tokenizer), open_template)


def _open_template(bundle: Bundle) -> ChatTemplate:
    """Importing its library takes longer than a small model takes to answer."""
    from corral.runtime.chat_template import ChatTemplate

    assert bundle.manifest.chat_template is not None
    path = bundle.path(bundle.manifest.chat_template)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable chat template: {error}. Compile again.") from None
    return ChatTemplate(source, bundle.manifest.special_tokens, where=str(path))


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json that the tokenizers package reads: {error}.") from None
    # Files saved from training may truncate or pad; a prompt must stay what it is.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
