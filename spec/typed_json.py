"""Typed look-ups in a JSON object of unknown origin, each refused with what was got and what was expected."""

from __future__ import annotations

from typing import Any

from corral.spec.errors import InputError


class TypedJson:
    """The object `data`, which errors call `where`; null counts as absent where there is a default."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def refuse(self, key: str, expected: str) -> InputError:
        value = self.data.get(key)
        got = "missing" if value is None else repr(value)[:80]
        return InputError(f"{self.where}: {key} is {got}, expected {expected}.")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.refuse(key, "a whole number below 2**31")
        return value

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """As `integer`, but an explicit null means None."""
        if key not in self.data:
            return default
        return None if self.data[key] is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, int):  # `true` and `4` both occur in published files
            raise self.refuse(key, "true or false")
        return bool(value)

    def integers(self, key: str) -> list[int] | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise self.refuse(key, "a list of whole numbers")
        return value
