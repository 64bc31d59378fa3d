"""The two optimization profiles of an engine: ranges for the free axes of its inputs, one row a profile.

One engine with two profiles holds its weights once; two engines would hold them twice. Prefill takes one sequence at a
time, which is how the runtime does it; decode takes many, one token each.

Prefill computes logits of one row only, though scoring a text would want them all: with a second free axis there, two
builds of one graph differ in a dozen bytes (which of two equal size expressions a tensor names), and with this one they
were equal in 50 builds of 50 (TensorRT for RTX 1.7.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corral.spec.errors import InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.recipe import Recipe

PREFILL_TOKENS = 512  # of one piece of a prompt; longer ones are cut

Range = tuple[int, int, int]  # least, what kernels are chosen for, most
Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Ranges by the name of an axis."""

    name: str
    axes: Mapping[str, Range]

    def shapes(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, likely and largest sizes of an input whose free axes are named."""
        ranges = [(d, d, d) if isinstance(d, int) else self.axes[d] for d in shape]
        least, likely, most = zip(*ranges, strict=True)
        return tuple(least), tuple(likely), tuple(most)


def profiles_for(recipe: Recipe, kv: Sequence[KvLayout]) -> tuple[Profile, ...]:
    """Decode and prefill of a bundle. Raises InputError where the recipe's context leaves no room."""
    rows = min((layout.fixed_rows for layout in kv if layout.fixed_rows is not None), default=recipe.max_context)
    tokens = min(PREFILL_TOKENS, rows)
    if tokens < 2:
        raise InputError(f"max_context is {recipe.max_context}, expected at least 2: a prompt and an answer.")
    one: Range = (1, 1, 1)
    return (
        Profile(name="decode", axes={"batch": (1, 1, recipe.max_batch), "tokens": one, "rows": one}),
        Profile(name="prefill", axes={"batch": one, "tokens": (1, tokens, tokens), "rows": one}),
    )
