"""FP8 (e4m3) weights: one scale per output, from its largest magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from corral.spec.errors import InputError

LARGEST = 448.0  # of float8_e4m3fn (OCP 8-bit floating point, table 2)
# The part of every scale that a matrix kernel may apply to its sums, see `gains`: about what a weight's scale usually is.
BASE = 2.0**-12
SMALLEST_SCALE = 2.0**-26  # its gain is the smallest normal number of float16; smaller weights keep absolute precision
SMALLEST_INPUT_SCALE = 2.0**-14  # the smallest normal number of float16


def e4m3(weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to e4m3 and float32 scales [outputs, 1]; value = scale * code, nearest even.

    Codes are float8_e4m3fn and never NaN; an output of zeros gets scale 1. Raises InputError where a weight is not
    finite.
    """
    extreme = largest_magnitudes(weight, "FP8")
    scales = np.maximum(extreme / np.float32(LARGEST), np.float32(SMALLEST_SCALE))
    scales[extreme == 0] = 1
    # The quotient can be a rounding above the largest code, and beyond it is NaN, not a clipped value.
    quotient = weight / scales
    np.clip(quotient, -LARGEST, LARGEST, out=quotient)
    return {"codes": quotient.astype(ml_dtypes.float8_e4m3fn), "scales": scales}


def largest_magnitudes(weight: NDArray[np.float32], codes: str) -> NDArray[np.float32]:
    """Of each output [outputs, 1]. Raises InputError where a weight is not finite; `codes` is the format's name."""
    extreme: NDArray[np.float32] = np.maximum(weight.max(axis=1, keepdims=True), -weight.min(axis=1, keepdims=True))
    if not np.isfinite(extreme).all():
        raise InputError(
            f"a weight is infinite or NaN, which no {codes} code can stand for: the checkpoint is damaged."
        )
    return extreme


def output_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of int4 codes with `scales` [outputs, groups] that become e4m3: one an output, [outputs, 1], by which -8 becomes -448."""
    largest = np.float32(8 / LARGEST) * scales.max(axis=1, keepdims=True)
    return np.maximum(largest, np.float32(SMALLEST_SCALE))


def group_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of int4's scales [outputs, groups] beside gains: codes times it, over BASE, are numbers for e4m3."""
    return scales / output_scales(scales) * np.float32(BASE)


def gains(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """scale = BASE * gain: what is left for after the product, so that float16 sums of codes do not overflow before."""
    return scales / np.float32(BASE)


def input_scale(_: NDArray[np.float32], *, statistics: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The scale of a matrix's inputs, one number: the largest magnitude seen becomes the largest code. A float16 number.

    `statistics`: "layer_largest" float32 [inputs], the largest |x| of each. Larger ones than any seen become that code, too.
    """
    largest = np.max(statistics["layer_largest"])
    return (
        np.maximum(largest / np.float32(LARGEST), np.float32(SMALLEST_INPUT_SCALE))
        .astype(np.float16)
        .astype(np.float32)
    )
