"""What each of the recipe's methods does to a matrix: the step that quantizes it, and what that step must know. A table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from corral.spec.quant_scheme import in_words
from corral.spec.recipe import Recipe

# Of a matrix that saw fewer tokens of the calibration text, its inputs' sums say too little: an expert that hardly any token
# visited is quantized without them, and the manifest names it.
MIN_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Method:
    """`by_group`: each group of inputs is quantized by itself, so a matrix may be cut along its inputs, too.

    `products`: what a calibration keeps of its inputs' X^T X for it.
    """

    step: str
    calibrated: bool = False
    by_group: bool = True
    rescales: bool = False  # inputs are scaled, and what makes them with them
    products: Literal["whole", "blocks", "none"] = "none"

    def arguments(
        self, bits: int, group_size: int, statistics: str, asymmetric: bool = False
    ) -> dict[str, int | float | str]:
        """The step's literal arguments."""
        scheme: dict[str, int | float | str] = {"bits": bits, "group_size": group_size}
        scheme |= {"asymmetric": True} if asymmetric else {}
        return scheme | ({"min_tokens": MIN_TOKENS, "statistics": statistics} if self.calibrated else {})


AS_PUBLISHED = Method(step="as_published")
METHODS = {
    "rtn": Method(step="rtn"),
    "rtn-mse": Method(step="rtn_mse"),
    "hqq": Method(step="hqq"),
    "awq": Method(step="awq", calibrated=True, by_group=False, rescales=True, products="blocks"),
    "gptq": Method(step="gptq", calibrated=True, by_group=False, products="whole"),
}
CALIBRATED_STEPS = {method.step for method in METHODS.values() if method.calibrated}


def method_for(published: str, recipe: Recipe) -> Method:
    """The method of a matrix with this recipe (`Recipe.of`). One `published` in just the scheme asked for keeps its codes."""
    asked = in_words(recipe.weights, recipe.group_size, recipe.asymmetric)
    return AS_PUBLISHED if published == asked else METHODS[recipe.method]


def needs_text(recipe: Recipe) -> bool:
    """Whether a calibration text decides on something: on codes, or on the scales of activations."""
    return recipe.rounds_activations or any(METHODS[method].calibrated for method in recipe.methods)
