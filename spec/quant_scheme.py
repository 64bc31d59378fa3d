"""How a weight matrix is stored: bits, group size, scale type. A table, read by recipes, quantizers and lowerings.

value = scale * (code - zero) with unsigned codes, one scale per `group_size` inputs of one output. Codes are symmetric,
zero = 2**(bits-1), or asymmetric: then each group has a zero point of its own, one of the codes. Group size counts along the
input dimension. FP8 has one scale per output, and its activations are FP8, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.spec.errors import InputError

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 128
ZERO_POINT_BITS = 4  # that a zero point is stored in, whatever its codes have


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """One way to store a matrix. `bits` is None for plain floating point of `dtype`."""

    name: str
    bits: int | None
    dtype: str  # of the stored values: an ONNX element type in lower case

    @property
    def is_quantized(self) -> bool:
        return self.bits is not None

    @property
    def is_float(self) -> bool:
        """Whether codes are small floating-point numbers with one scale an output, multiplied with their like."""
        return self.dtype.startswith("float8")

    @property
    def takes_methods(self) -> bool:
        """Whether there is more than one way to choose codes: they are whole numbers, with a scale a group."""
        return self.is_quantized and not self.is_float

    @property
    def takes_zero_points(self) -> bool:
        """Whether codes may be asymmetric: with 8 bits there are enough of them on either side of 0."""
        return self.takes_methods and self.bits is not None and self.bits <= ZERO_POINT_BITS

    def bits_per_weight(self, group_size: int) -> float:
        """Stored bits per weight, float32 scales of groups included."""
        if self.bits is None:
            return {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}[self.dtype]
        return self.bits + (0 if self.is_float else 32 / group_size)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantScheme(name="fp32", bits=None, dtype="float32"),
        QuantScheme(name="fp16", bits=None, dtype="float16"),
        QuantScheme(name="bf16", bits=None, dtype="bfloat16"),
        QuantScheme(name="fp8", bits=8, dtype="float8e4m3fn"),
        QuantScheme(name="int8", bits=8, dtype="int8"),
        QuantScheme(name="int4", bits=4, dtype="int4"),
        # ONNX has no 3 bits, and few backends its 2: until a lowering stores them, codes are kept as INT4.
        QuantScheme(name="int3", bits=3, dtype="int4"),
        QuantScheme(name="int2", bits=2, dtype="int4"),
    )
}


def in_words(scheme: str, group_size: int, asymmetric: bool = False) -> str:
    """A quantized weight's storage, as in "int4 g128" or "int4 g128 asymmetric". Equal words: equal codes, scales and zero
    points mean the same numbers.
    """
    if SCHEMES[scheme].is_float:
        return f"{scheme} per output"
    return f"{scheme} g{group_size}" + (" asymmetric" if asymmetric else "")


def scheme_named(name: str) -> QuantScheme:
    """Look a scheme up. Raises InputError naming those there are."""
    if name not in SCHEMES:
        raise InputError(f'weights "{name}" are not known; expected one of {", ".join(SCHEMES)}.')
    return SCHEMES[name]
