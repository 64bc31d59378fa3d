"""Graph passes, quantizers, lowering per target, plan execution, and `compile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corral.graphs.compiler import compile as compile
    from corral.graphs.rehearsal import rehearse as rehearse

__all__ = ["compile", "rehearse"]


def __getattr__(name: str) -> Any:
    """Load the compiler, and torch with it, when it is first asked for."""
    if name == "compile":
        from corral.graphs.compiler import compile

        return compile
    if name == "rehearse":
        from corral.graphs.rehearsal import rehearse

        return rehearse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
