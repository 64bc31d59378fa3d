"""The results of benchmarks/cpu.py as the README's table, as one table a shape in docs/llama-cpp.md, and as a picture.

    python benchmarks/cpu_summary.py           writes all of them anew
    python benchmarks/cpu_summary.py --table   prints the README's table only

Both documents have marks around what is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, DETAILS, PICTURE = ROOT / "README.md", ROOT / "docs/llama-cpp.md", ROOT / "docs/cpu-speed.svg"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- speed table -->\n", "<!-- end of speed table -->\n"
SHAPES = {"wide": "Scout's width, 4 layers, 9.1 B", "half": "0.5 B", "demo": "demo, 15 M"}
TESTS = {
    "decode at 16": "decode",
    "decode at 7936": "decode, 8k behind",
    "decode at 32512": "decode, 32k behind",
    "prefill 128": "prefill 128",
    "prefill 512": "prefill 512",
    "prefill 2048": "prefill 2048",
    "4 sequences": "4 sequences",
    "8 sequences": "8 sequences",
    "16 sequences": "16 sequences",
}
OURS = "corral"
Result = Mapping[str, Any]


def main() -> None:
    results = read_results()
    if "--table" in sys.argv:
        print(table(results), end="")
        return
    put(README, table(results))
    put(DETAILS, "\n".join(details(shape, result) for shape, result in results.items()))
    PICTURE.write_text(picture(results))


def put(path: Path, text: str) -> None:
    """Replace what stands between the marks in a file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path} has no place for the table")
    path.write_text(before + BEGIN + text + END + after)


def read_results() -> dict[str, Result]:
    """By shape, of those that were measured."""
    paths = {shape: RESULTS / f"cpu-{shape}.json" for shape in SHAPES}
    return {shape: json.loads(path.read_text()) for shape, path in paths.items() if path.exists()}


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a row for each test, a column for each shape."""
    rows: list[Sequence[str]] = [["corral / llama.cpp", *(SHAPES[shape] for shape in results)]]
    rows.append(["---"] * len(rows[0]))
    for test, name in TESTS.items():
        if not any(test in result["tests"] for result in results.values()):
            continue
        rows.append([f"{name}, tokens/s", *(_rate(result, test) for result in results.values())])
    rows.append(["decode, of what memory allows", *(_rooflines(result) for result in results.values())])
    rows.append(["KL from float32, nats a token", *(_divergences(result) for result in results.values())])
    rows.append(["anonymous memory, MB", *(_pair(result, _anonymous) for result in results.values())])
    rows.append(["process to second token, s", *(_pair(result, _cold) for result in results.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def details(shape: str, result: Result) -> str:
    """Markdown of one shape: tokens a second of every contestant, median (lowest to highest)."""
    names = list(next(iter(result["tests"].values())))
    rows: list[Sequence[str]] = [[SHAPES[shape], *names, f"{OURS} over llama.cpp's best"], ["---"] * (len(names) + 2)]
    for test, found in result["tests"].items():
        cells = []
        for name in names:
            low, high = found[name]["range"]
            cells.append(f"{_number(found[name]['tokens_per_second'])} ({_number(low)} to {_number(high)})")
        rows.append([TESTS.get(test, test), *cells, f"{result['ratio'][test]:.2f}"])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if "kl" in result:
        kl = ", ".join(f"{name} {divergence:.3f}" for name, divergence in result["kl"].items())
        text += f"\nKL from the checkpoint in float32, nats a token: {kl}.\n"
    return text


def _rate(result: Result, test: str) -> str:
    if test not in result["tests"]:
        return ""
    rates = {name: one["tokens_per_second"] for name, one in result["tests"][test].items()}
    best = max(rate for name, rate in rates.items() if _is_theirs(name))
    return f"{_number(rates[OURS])} / {_number(best)} = **{result['ratio'][test]:.2f}** x"


def _rooflines(result: Result) -> str:
    shares = {name: one["roofline"] for name, one in result["tests"]["decode at 16"].items()}
    return f"{shares[OURS]:.0%} / {max(share for name, share in shares.items() if _is_theirs(name)):.0%}"


def _divergences(result: Result) -> str:
    if "kl" not in result:
        return ""
    theirs = (f"{kl:.3f} {name.split()[1]}" for name, kl in result["kl"].items() if _is_theirs(name))
    return f"{result['kl'][OURS]:.3f} / {', '.join(theirs)}"


def _pair(result: Result, of: Any) -> str:
    models = result["models"]
    return f"{of(models[OURS])} / {min((of(one) for name, one in models.items() if _is_theirs(name)), key=float)}"


def _anonymous(model: Result) -> str:
    memory = model["anonymous_bytes"]
    return f"{(memory['after'] - memory['imported']) / 1e6:.0f}"


def _cold(model: Result) -> str:
    return f"{model['cold_to_second_token_s']:.2f}"


def _is_theirs(name: str) -> bool:
    return name.startswith("llama.cpp")


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def picture(results: Mapping[str, Result]) -> str:
    """SVG: every ratio as a dot, on a logarithmic axis, with the line where both are equal."""
    import vl_convert

    dots = [
        {"shape": SHAPES[shape], "test": name, "ratio": result["ratio"][test]}
        for shape, result in results.items()
        for test, name in TESTS.items()
        if test in result["ratio"]
    ]
    axis = {"title": "tokens/s, times llama.cpp's", "values": [0.5, 1, 1.5, 2, 3, 4]}
    x = {
        "field": "ratio",
        "type": "quantitative",
        "scale": {"type": "log", "domain": [0.5, 5], "nice": False},
        "axis": axis,
    }
    y = {"field": "test", "type": "nominal", "sort": list(TESTS.values()), "title": None}
    legend = {"title": None, "orient": "bottom"}
    by_shape = {"field": "shape", "type": "nominal", "sort": None, "legend": legend}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "width": 420,
        "height": {"step": 26},
        "data": {"values": dots},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 4], "color": "#666"}, "encoding": {"x": {"datum": 1}}},
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": by_shape, "shape": by_shape},
            },
        ],
    }
    svg: str = vl_convert.vegalite_to_svg(spec)
    return svg + "\n"


if __name__ == "__main__":
    main()
