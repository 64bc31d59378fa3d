"""Messages -> the prompt's text, by the bundle's Jinja template in a sandbox: a template is somebody else's program.

The sandbox denies attributes that lead out of the template, changes to its arguments, and ranges, products and output
of unreasonable size. A loop that only burns time cannot be stopped from inside Python: open templates you trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from corral.runtime.chat import Message, check_messages
from corral.spec.errors import InputError

MAX_ITEMS = 1 << 20  # of the result of `text * n`, and bits of a power
MAX_OUTPUT = 64 << 20  # characters


class ChatTemplate:
    """One template, compiled; `render` may be called any number of times."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str = "chat template") -> None:
        self._special_tokens, self._where = dict(special_tokens), where
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, ValueError) as error:
            raise InputError(f"{where} is not a valid Jinja template: {error}. Replace it and compile again.") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation. Raises InputError for malformed messages, and with whatever the template says."""
        check_messages(messages)
        context = {**self._special_tokens, **variables}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **context
            ):
                pieces.append(piece)
                if (size := size + len(piece)) > MAX_OUTPUT:
                    raise InputError(
                        f"{self._where} wrote more than {MAX_OUTPUT} characters; such a template is refused."
                    )
        except InputError:
            raise
        except TemplateError as error:
            raise InputError(f"{self._where} refuses these messages: {error}.") from None
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise InputError(f"{self._where} fails on these messages: {type(error).__name__}: {error}.") from None
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, count in ((left, right), (right, left)):
                if hasattr(items, "__len__") and isinstance(count, int) and len(items) * count > MAX_ITEMS:
                    raise SecurityError(f"a product of more than {MAX_ITEMS} items")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_ITEMS:
            raise SecurityError(f"a power of more than {MAX_ITEMS} bits")
        return super().call_binop(context, operator, left, right)


def _tojson(value: Any, indent: int | None = None, sort_keys: bool = False, **options: Any) -> str:
    # Jinja's own escapes <, > and & for HTML; a prompt wants the text as it is.
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
