"""FP8 (E4M3) weights: each output's largest magnitude becomes the format's largest number, 448.

    value = gain[output] * BASE * code

`BASE` is one constant for all weights, so that what a matrix kernel multiplies has the size that weights usually have,
and float16 products do not overflow before the output's own gain brings them to scale.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

LARGEST = 448.0  # of E4M3 (OCP 8-bit floating point, 2023, table 1)
BASE = 2.0**-12
SMALLEST = 2.0**-24


def fp8(weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Quantize [outputs, inputs] to codes float8_e4m3fn [outputs, inputs] and gains float32 [outputs, 1], all positive."""
    # Not below SMALLEST, so that the gain is a float16 number: what is smaller keeps its absolute precision.
    extreme = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.float32(SMALLEST))
    codes = np.clip(weight * (np.float32(LARGEST) / extreme), -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return {"codes": codes, "gains": extreme / np.float32(LARGEST * BASE)}
