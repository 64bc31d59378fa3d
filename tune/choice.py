"""The ways of storing a part that are tried, and the values that a matrix then has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.graphs.calibrate.statistics import Statistics
from corral.graphs.execute.steps import STEPS
from corral.graphs.quantize.methods import METHODS
from corral.graphs.quantize.rtn_mse import decode
from corral.spec.quant_scheme import DEFAULT_GROUP_SIZE, GROUP_SIZES, scheme_named
from corral.spec.weight_plan import Source

# `awq` is not among them: it scales what several matrices read, so it is for all of them or none.
METHODS_TRIED = {
    "fp32": ("rtn",),
    "int8": ("gptq", "rtn"),
    "int4": ("gptq", "rtn-mse", "hqq"),
    "int3": ("gptq", "rtn-mse", "hqq"),
    "int2": ("gptq", "rtn-mse", "hqq"),
}

Storage = tuple[str, int]  # weights, group size
STORAGES: tuple[Storage, ...] = tuple(
    (weights, group)
    for weights in METHODS_TRIED
    for group in (GROUP_SIZES if scheme_named(weights).is_quantized else (DEFAULT_GROUP_SIZE,))
)


@dataclass(frozen=True, kw_only=True, order=True)
class Choice:
    """One way to store a matrix: the recipe's keys of these names."""

    weights: str
    group_size: int
    method: str

    @property
    def storage(self) -> Storage:
        """What its bytes and its speed hang on; which codes are chosen makes no difference to them."""
        return self.weights, self.group_size

    def __str__(self) -> str:
        quantized = scheme_named(self.weights).is_quantized
        return f"{self.weights} g{self.group_size} {self.method}" if quantized else self.weights


def rounded(weight: NDArray[np.float32], choice: Choice, statistics: Statistics, source: Source) -> NDArray[np.float32]:
    """The values of a matrix [outputs, inputs], read from `source`, when it is quantized by a choice."""
    bits = scheme_named(choice.weights).bits
    assert bits is not None
    method = METHODS[choice.method]
    arguments: dict[str, Any] = method.arguments(bits, choice.group_size, "")
    if method.calibrated:
        arguments["statistics"] = statistics.of(source)
    found = STEPS[method.step](weight, **arguments)
    return decode(found["codes"], found["scales"], bits=bits)
