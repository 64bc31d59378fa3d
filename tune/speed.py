"""Decode speed from bytes: a token costs a fixed time, and time for each byte of weights that it reads.

Both are measured here, with two builds of the checkpoint: all int4 and all int8. A token reads of the routed experts only
those that it visits.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.graphs.compiler import compile
from corral.spec.progress import Progress, silent
from corral.spec.quant_scheme import GROUP_SIZES
from corral.spec.recipe import Recipe
from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.tune.sizes import Sizes
from corral.validate.build import open_build
from corral.validate.latency import measure_latency

PROMPT, REPEATS = [0] * 16, 5


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds a token = `fixed` + `per_byte` · the bytes of parts that it reads."""

    fixed: float
    per_byte: float

    def tokens_per_second(self, read: float) -> float:
        return 1 / (self.fixed + self.per_byte * read)

    def most_read(self, tokens_per_second: float) -> float:
        """Bytes that a token may read at such a speed; below zero where none is fast enough."""
        return (1 / tokens_per_second - self.fixed) / self.per_byte


def measure_speed(
    checkpoint: Path,
    recipe: Recipe,
    sizes: Sizes,
    parts: Sequence[Part],
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Speed:
    """Compile the two builds in the temporary directory, and time them."""
    group = max(size for size in GROUP_SIZES if all(sizes.fits(part, ("int4", size)) for part in parts))
    both = [Choice(weights=weights, group_size=group, method="rtn") for weights in ("int4", "int8")]
    with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
        builds = []
        for choice in both:
            build = dataclasses.replace(recipe, **dataclasses.asdict(choice))
            compile(checkpoint, Path(scratch) / choice.weights, build, progress=progress)
            builds.append(open_build(Path(scratch) / choice.weights, provider="cpu", threads=threads))
        found = measure_latency(builds, PROMPT, repeats=REPEATS, progress=progress)
    fast, slow = (1 / latency.tokens_per_second.median for latency in found if latency)
    read = [sizes.read(dict.fromkeys(parts, choice)) for choice in both]
    # Never below zero: of a small model the noise may be larger than what bytes cost.
    per_byte = max((slow - fast) / (read[1] - read[0]), 1e-15)
    return Speed(fixed=max(fast - per_byte * read[0], 0.0), per_byte=per_byte)
