"""The messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corral.spec.errors import InputError

Message = Mapping[str, Any]


def check_messages(messages: Any) -> None:
    """Raise InputError unless `messages` is a list of {"role": …, "content": …}; with "tool_calls", content is optional."""
    example = 'expected a list like [{"role": "user", "content": "…"}].'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is a {type(messages).__name__}, {example}")
    if not messages:
        raise InputError(f"messages is empty, {example}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'message {i} is {str(message)[:80]!r} without a "role" string, {example}')
        if not isinstance(message.get("content"), str | list | tuple) and "tool_calls" not in message:
            raise InputError(
                f'message {i} has "content" {message.get("content")!r}, expected a string or a list of parts.'
            )
