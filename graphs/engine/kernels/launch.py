"""The routed experts as three launches: which kernel, how large a grid, which arguments. Plain data, for whoever launches.

    moe_route    logits                                       -> expert, visit, gate, offset
    moe_gate_up  x, visit, gate, offset, gate_up              -> h
    moe_down     h, visit, offset, down                       -> y

Letters: T tokens, H hidden, I expert width, E experts, K experts per token, V = T * K visits. Arguments of a kernel are
its inputs, then int32 sizes, then its outputs: the order in which TensorRT passes them to an ahead-of-time plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from corral.graphs.quantize.fragments import TILE_INPUTS, TILE_OUTPUTS
from corral.spec.errors import InputError
from corral.spec.quant_scheme import GROUP_SIZES

ROUTE_THREADS = 1024
MAX_EXPERTS = 1024
MAX_CHUNKS = 2**32 - 1  # of 16 bytes, in x and in h: the kernels count them in 32 bits
MAX_OUTPUTS = 1 << 20  # keeps a grid below 65536 blocks in y


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the kernels read a weight. `scale_dtype` is None where there are no scales."""

    name: str
    bits: int
    code_dtype: str
    scale_dtype: str | None
    grouped: bool  # scales along the inputs, too


FORMATS = {
    row.name: row
    for row in (
        WeightFormat(name="int4", bits=4, code_dtype="uint8", scale_dtype="float16", grouped=True),
        WeightFormat(name="fp8", bits=8, code_dtype="uint8", scale_dtype="float32", grouped=False),
        WeightFormat(name="fp16", bits=16, code_dtype="float16", scale_dtype=None, grouped=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the two products share out their work over the warps of a block."""

    name: str
    tokens: int  # of a tile
    split_k: int  # warps that share the inputs, and add up at the end
    row_warps: int  # warps that share the outputs
    row_tiles: int  # tiles of 16 outputs a warp
    blocks: int  # that should fit on a multiprocessor at once: bounds the registers

    @property
    def threads(self) -> int:
        return 32 * self.split_k * self.row_warps

    @property
    def block_outputs(self) -> int:
        return TILE_OUTPUTS * self.row_tiles * self.row_warps

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        names = ("tokens", "split_k", "row_warps", "row_tiles", "blocks")
        return tuple((name.upper(), getattr(self, name)) for name in names)


# Both are right for every number of tokens; they differ in speed.
DECODE = Tiling(name="decode", tokens=8, split_k=8, row_warps=1, row_tiles=2, blocks=2)
PREFILL = Tiling(name="prefill", tokens=64, split_k=1, row_warps=4, row_tiles=2, blocks=3)
TILINGS = (DECODE, PREFILL)


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """The routed experts of one layer, as the kernels see them."""

    hidden: int
    width: int
    experts: int
    top_k: int
    weights: str  # a name in FORMATS
    group_size: int = 0  # for int4

    @property
    def format(self) -> WeightFormat:
        return FORMATS[self.weights]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One entry point: its source file in this folder and the macros that it is compiled with. `name` is for tables."""

    name: str
    entry: str
    macros: tuple[tuple[str, int], ...] = ()

    @property
    def source(self) -> str:
        return f"{self.entry}.cu"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch. Inputs and outputs are names of `buffers`, sizes int32. No dynamic shared memory."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    inputs: tuple[str, ...]
    sizes: tuple[int, ...]
    outputs: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str | int, ...]:
        """In the order in which the kernel takes them."""
        return (*self.inputs, *self.sizes, *self.outputs)


ROUTE = Kernel(name="moe_route", entry="moe_route")


def product_kernel(entry: str, weights: WeightFormat, tiling: Tiling) -> Kernel:
    """`moe_gate_up` or `moe_down` for one weight format and tiling."""
    macros = (("WEIGHT_BITS", weights.bits), *tiling.macros)
    return Kernel(name=f"{entry}.{weights.name}.{tiling.name}", entry=entry, macros=macros)


KERNELS = (
    ROUTE,
    *(
        product_kernel(entry, weights, tiling)
        for entry in ("moe_gate_up", "moe_down")
        for tiling in TILINGS
        for weights in FORMATS.values()
    ),
)


def _divides(size: int, *numbers: int) -> bool:
    return all(number % size == 0 for number in numbers)


# What the kernels cannot do: (is it so?, what to say). Read in this order.
REFUSALS: tuple[tuple[Callable[[MoeShape], bool], str], ...] = (
    (lambda s: s.weights not in FORMATS, f"weights are {{weights!r}}, expected one of {', '.join(FORMATS)}"),
    (lambda s: s.hidden < TILE_INPUTS or s.hidden % TILE_INPUTS > 0, "hidden size {hidden} is not a multiple of 64"),
    (lambda s: s.width < TILE_INPUTS or s.width % TILE_INPUTS > 0, "expert width {width} is not a multiple of 64"),
    (lambda s: not 8 <= s.experts <= MAX_EXPERTS or s.experts % 8 > 0, "{experts} experts: expected 8, 16, … 1024"),
    (lambda s: not 1 <= s.top_k <= s.experts, "{top_k} experts a token, of {experts}"),
    (
        lambda s: s.format.grouped and not (s.group_size in GROUP_SIZES and _divides(s.group_size, s.hidden, s.width)),
        f"group size {{group_size}}: expected one of {GROUP_SIZES} that divides {{hidden}} and {{width}}",
    ),
    (lambda s: not s.format.grouped and s.group_size != 0, "{weights} weights have no group size, got {group_size}"),
    (lambda s: max(s.hidden, 2 * s.width) > MAX_OUTPUTS, f"{{hidden}} by {{width}}: more than {MAX_OUTPUTS} outputs"),
)


def refusal(shape: MoeShape) -> str:
    """Why the kernels cannot do a shape; empty where they can."""
    return next((words.format_map(vars(shape)) for is_so, words in REFUSALS if is_so(shape)), "")


def check(shape: MoeShape) -> None:
    """Raises InputError where the kernels cannot do a shape."""
    if reason := refusal(shape):
        raise InputError(f"corral's mixture-of-experts kernels cannot do this model: {reason}. Use another target.")


def max_tiles(visits: Any, experts: int, tile_tokens: int, least: Callable[[Any, int], Any] = min) -> Any:
    """The most tiles that visits can fall into, however they are routed: full ones, and one more an expert visited.

    An int, or an expression where `visits` is one and `least` its minimum.
    """
    visited = least(visits, experts)
    return visited + (visits - visited) // tile_tokens


def tiling_for(shape: MoeShape, tokens: int) -> Tiling:
    """Prefill's tiles where they would be a quarter full on average. An estimate: not measured on hardware."""
    return PREFILL if tokens * shape.top_k >= shape.experts * PREFILL.tokens // 4 else DECODE


def buffers(shape: MoeShape, tokens: Any) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every buffer of the launches: dtype and shape, for tokens as an int or an expression.

    Activations and weights must be aligned to 16 bytes.
    """
    visits = tokens * shape.top_k
    table: dict[str, tuple[str, tuple[Any, ...]]] = {
        "logits": ("float32", (tokens, shape.experts)),
        "x": ("float16", (tokens, shape.hidden)),
        "expert": ("int32", (visits,)),
        "visit": ("int32", (visits,)),
        "gate": ("float32", (visits,)),
        "offset": ("int32", (shape.experts + 1,)),
        "h": ("float16", (visits, shape.width)),
        "y": ("float16", (visits, shape.hidden)),
    }
    weights = shape.format
    for name, outputs, inputs in (
        ("gate_up", 2 * shape.width, shape.hidden),
        ("down", shape.hidden, shape.width),
    ):
        tiles = (shape.experts, outputs // TILE_OUTPUTS)
        elements = TILE_OUTPUTS * TILE_INPUTS // (2 if weights.bits == 4 else 1)
        table[f"{name}.codes"] = (weights.code_dtype, (*tiles, inputs // TILE_INPUTS, elements))
        if weights.scale_dtype:
            groups = inputs // shape.group_size if weights.grouped else 1
            table[f"{name}.scales"] = (weights.scale_dtype, (*tiles, groups, TILE_OUTPUTS // 2, 2))
    return table


def launches(shape: MoeShape, tokens: int, tiling: Tiling | None = None) -> tuple[Launch, Launch, Launch]:
    """The three launches for this many tokens, in order. Raises InputError where `check` does, or for no or too many
    tokens."""
    check(shape)
    most = MAX_CHUNKS // (max(shape.hidden, shape.width) // 8) // shape.top_k
    if not 1 <= tokens <= most:
        raise InputError(
            f"{tokens} tokens at once; corral's mixture-of-experts kernels take 1 to {most} of this model."
        )
    tiling = tiling or tiling_for(shape, tokens)
    gate_up, down = (product(entry, shape, tokens, tiling) for entry in ("moe_gate_up", "moe_down"))
    return route(shape, tokens), gate_up, down


def route(shape: MoeShape, tokens: Any) -> Launch:
    """The launch of `moe_route`. `tokens` is an int, or an expression."""
    return Launch(
        kernel=ROUTE,
        grid=(1, 1, 1),
        threads=ROUTE_THREADS,
        inputs=("logits",),
        sizes=(tokens, shape.experts, shape.top_k),
        outputs=("expert", "visit", "gate", "offset"),
    )


def product(entry: str, shape: MoeShape, tokens: Any, tiling: Tiling, least: Callable[[Any, int], Any] = min) -> Launch:
    """The launch of `moe_gate_up` or `moe_down`. `tokens` is an int, or an expression and `least` its minimum."""
    weight, inputs, output, outputs = {
        "moe_gate_up": ("gate_up", ("x", "visit", "gate", "offset"), "h", 2 * shape.width),
        "moe_down": ("down", ("h", "visit", "offset"), "y", shape.hidden),
    }[entry]
    stored = (f"{weight}.codes", f"{weight}.scales") if shape.format.scale_dtype else (f"{weight}.codes",)
    return Launch(
        kernel=product_kernel(entry, shape.format, tiling),
        grid=(
            max_tiles(tokens * shape.top_k, shape.experts, tiling.tokens, least),
            -(-outputs // tiling.block_outputs),
            1,
        ),
        threads=tiling.threads,
        inputs=(*inputs, *stored),
        sizes=(tokens, shape.hidden, shape.width, shape.experts, shape.top_k, shape.group_size),
        outputs=(output,),
    )
