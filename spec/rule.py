"""What a recipe says of single matrices: a line each, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from corral.spec.errors import InputError

KEYS = {"matrices": str, "weights": str, "group_size": int, "asymmetric": bool, "method": str}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How matrices are stored whose names match `matrices`; None: as the recipe, or a rule before this one, says.

    Names are the checkpoint's, without "model." and ".weight": `layers.3.self_attn.q_proj`, `lm_head`. `*` stands for any
    letters, `[qkv]` for one of these.
    """

    matrices: str
    weights: str | None = None
    group_size: int | None = None
    asymmetric: bool | None = None
    method: str | None = None

    def matches(self, weight: str) -> bool:
        """Whether it speaks of the parameter `weight`."""
        return fnmatchcase(weight.removesuffix(".weight"), self.matrices)

    def changes(self) -> dict[str, Any]:
        """The recipe's keys that it sets."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if key != "matrices" and value is not None
        }

    @staticmethod
    def from_json(data: Any, where: str) -> Rule:
        """Make a rule of a mapping. Raises InputError for unknown keys and values of the wrong type."""
        known = ", ".join(KEYS)
        if not isinstance(data, dict) or not isinstance(data.get("matrices"), str):
            raise InputError(
                f"{where} is {str(data)[:80]}; expected a table with `matrices`, a name or pattern, and {known}."
            )
        for key, value in data.items():
            if key not in KEYS:
                raise InputError(f'{where}: key "{key}" is not known; expected {known}.')
            if value is not None and type(value) is not KEYS[key]:
                raise InputError(f"{where}: {key} is {value!r}, expected a {KEYS[key].__name__}.")
        return Rule(**data)
