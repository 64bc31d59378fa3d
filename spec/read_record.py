"""JSON -> frozen dataclasses, the type of every field checked on the way: for files of corral's that may be damaged."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from corral.spec.errors import InputError
from corral.spec.recipe import Recipe


def read_record(kind: Any, data: Any, where: str) -> Any:
    """Build the (nested) dataclass or container `kind` of JSON `data`. Raises InputError, naming the field by `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        return read_record(next((a for a in choices if type(data) is a), choices[0]), data, where)
    if kind is Recipe and isinstance(data, dict):
        return Recipe.from_json(data, where=where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(read_record(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: read_record(arguments[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin is typing.Literal and data in arguments:
        return data
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and type(data) is kind and not (isinstance(data, int) and data < 0):
        return data
    raise InputError(f"{where} is {str(data)[:80]!r}, expected {getattr(kind, '__name__', kind)}: the file is damaged.")


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where} is {str(data)[:80]!r}, expected an object: the file is damaged.")
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - data.keys()):
        raise InputError(f"{where} lacks {', '.join(missing)}: the file is damaged.")
    # Unknown keys are kept out rather than refused: a newer minor version may add some.
    return kind(**{name: read_record(hints[name], data[name], f"{where}: {name}") for name in hints if name in data})
