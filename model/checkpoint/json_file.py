"""Read a JSON object of unknown origin: not too large, not too deep, no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corral.spec.errors import InputError

# The largest side file that is read (an index of Maverick's tensors has 0.1 MB): a hostile one must not fill memory.
JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file `path`. Raises InputError: unreadable, too large, not JSON, not an object, a key twice."""
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise InputError(
                f"{path} has {size} bytes; expected at most {JSON_BYTES} of a JSON file beside a checkpoint."
            )
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`; `where` names it in errors."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, integers of absurd length
        raise InputError(f"{where} is not readable JSON: {error}. It is damaged: download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """JSON leaves a repeated key undefined, so two readers may see two different tensors: refuse it."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f'{where} has the key "{twice[:80]}" twice: it is damaged.')
    return result
