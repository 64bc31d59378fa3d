"""Numbers as people read them: every one with its unit, and where it was measured, its spread."""

from __future__ import annotations

import math

# Spelled out: in code they are easily taken for a hyphen and an x.
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
UNKNOWN = DASH
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def size(count: float) -> str:
    """Bytes, decimal: 56100000 -> "56.1 MB"."""
    return next((f"{count / unit:.1f} {name}" for unit, name in SIZES if count >= unit), f"{count:.0f} B")


def count(number: float) -> str:
    """How many: 14100000 -> "14.1 M"."""
    return next((f"{number / unit:.1f} {name}" for unit, name in COUNTS if number >= unit), f"{number:.0f}")


def counted(number: int, noun: str) -> str:
    """How many of what: (1, "layer") -> "1 layer", (48, "layer") -> "48 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds(value: float) -> str:
    """A duration: 0.0091 -> "9.1 ms", 75 -> "75 s", 600 -> "10 min"."""
    if value >= 300:
        return f"{value / 60:.0f} min"
    if value >= 1:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value * 1e3:.1f} ms" if value < 0.0995 else f"{value * 1e3:.0f} ms"


def seconds_range(median: float, low: float, high: float) -> str:
    """Repeated measurements of a duration, in one unit: "9.1 ms (8.8-9.5)" (with a dash)."""
    factor, unit = (1.0, "s") if median >= 1 else (1e3, "ms")
    return f"{median * factor:.1f} {unit} ({low * factor:.1f}{DASH}{high * factor:.1f})"


def percent(share: float, stderr: float | None = None) -> str:
    """A share of 1: (0.961, 0.002) -> "96.1 ± 0.2 %"."""
    return f"{with_error(share * 100, None if stderr is None else stderr * 100, decimals=1)} %"


def with_error(mean: float, stderr: float | None, *, decimals: int) -> str:
    """A measured mean and its standard error, with as many decimals as the error deserves, at least `decimals`."""
    if not math.isfinite(mean):
        return UNKNOWN
    if mean and abs(mean) < 0.5 * 10**-decimals:  # would read as zero, which it is not
        return f"{mean:.1e}" if stderr is None or not math.isfinite(stderr) else f"{mean:.1e} ± {stderr:.0e}"
    if stderr is None or not math.isfinite(stderr):
        return f"{mean:.{decimals}f}"
    wanted = -math.floor(math.log10(stderr)) if stderr > 0 else 0  # shows one digit of the error
    if wanted <= decimals + 2:
        decimals = max(decimals, wanted)
    return f"{mean:.{decimals}f} ± {stderr:.{decimals}f}"
