"""What compression cost and what it bought: accuracy and speed of builds side by side. `compare` loads when touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corral.validate.comparison import compare as compare

__all__ = ["compare"]


def __getattr__(name: str) -> Any:
    if name != "compare":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from corral.validate.comparison import compare

    return compare
