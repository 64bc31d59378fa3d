"""What tuning asks for and gives, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from corral.spec.recipe import Recipe
from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.validate.statistics import Spread

UNITS = {"kl": "nats a token", "size": "bytes", "tokens-per-second": "tokens a second"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What must be kept: mean KL divergence in nats a token at most, bytes at most, or tokens per second at least."""

    what: Literal["kl", "size", "tokens-per-second"]
    limit: float

    def __str__(self) -> str:
        return f"at {'least' if self.what == 'tokens-per-second' else 'most'} {self.amount(self.limit)}"

    def amount(self, number: float) -> str:
        """A number of what is limited, with its unit."""
        return f"{self._digits(number)} {UNITS[self.what]}"

    def repeated(self, measured: Spread) -> str:
        """A repeated measurement of what is limited: its median, and between what and what."""
        low, high = self._digits(measured.min), self._digits(measured.max)
        return f"{self.amount(measured.median)} ({low} to {high} in {measured.n} runs)"

    def _digits(self, number: float) -> str:
        return f"{number:,.0f}" if number >= 100 or self.what == "size" else f"{number:.3g}"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One part stored one way, all others in float32: nats a token, and bytes."""

    part: Part
    choice: Choice
    kl: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        choice = dataclasses.asdict(self.choice)
        return {"matrices": self.part.pattern, **choice, "kl": self.kl, "bytes": self.bytes}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was chosen, on what grounds."""

    budget: Budget
    recipe: Recipe
    chosen: tuple[Tried, ...]  # one a part
    tried: tuple[Tried, ...]
    kl: float  # of all that was chosen together, measured
    bytes: int  # of the bundle
    tokens_per_second: Spread | None  # where asked for: timed once more when it was chosen
    tokens: int  # that divergence was measured on
    text: str

    @property
    def sum_of_parts(self) -> float:
        """What the parts' divergences, measured one by one, add up to."""
        return sum(tried.kl for tried in self.chosen)

    def to_json(self) -> dict[str, Any]:
        rows = {name: [tried.to_json() for tried in getattr(self, name)] for name in ("chosen", "tried")}
        numbers = {name: getattr(self, name) for name in ("kl", "bytes", "tokens", "text")}
        numbers["tokens_per_second"] = dataclasses.asdict(self.tokens_per_second) if self.tokens_per_second else None
        return {"recipe": self.recipe.to_json(), **numbers, "kl_sum_of_parts": self.sum_of_parts, **rows}
