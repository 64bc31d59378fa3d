"""A comparison in pictures, as Vega-Lite specifications: plain data, which vl-convert draws as SVG.

Colours are the page's CSS variables, so that one picture serves light, dark and paper.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from corral.cli.report_view import worst_answer
from corral.validate.pareto import pareto_front

if TYPE_CHECKING:
    from corral.validate.layers import ExpertFidelity, Fidelity, LayerByLayer, LayerFidelity
    from corral.validate.report import CandidateResult, Report

Spec = dict[str, Any]
Rows = list[dict[str, Any]]

# Beyond these lies the rounding of floats, which would fill the axes.
LEAST_KL = 1e-5  # nats: less is drawn as this
MOST_DECIBELS = 60.0  # more is drawn as this, and less than none as none
MOST_CELLS = 16_384  # of experts' pictures all together: five builds of Maverick. More would not fit into 5 MB.
WIDTH, HEIGHT = 340, 250  # readable without scaling where two stand side by side and, nearly, on a phone
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
DECIBELS = (0, 5, 10, 15, 20, 30)  # where the colour of an expert changes
TOKENS = (1, 16, 64, 256, 1024)

AXIS = {"domainColor": "var(--line)", "gridColor": "var(--line)", "tickColor": "var(--line)", "labelOverlap": True}
WORDS = {"labelColor": "var(--quiet)", "titleColor": "var(--text)", "labelFontSize": 11, "titleFontSize": 11}
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "axis": AXIS | WORDS | {"gridOpacity": 0.5},
    "legend": WORDS | {"orient": "bottom", "columns": 3, "labelLimit": 110, "title": None, "symbolOpacity": 1},
    "view": {"stroke": None},
    "range": {"category": [f"var(--build{i})" for i in range(len(SHAPES))], "symbol": list(SHAPES)},
    "aria": False,  # thousands of marks; the tables say the same
}
BUILD: Spec = {"field": "build", "type": "nominal", "sort": None}
LINE: Spec = BUILD | {"legend": {"symbolType": "stroke", "symbolFillColor": "transparent", "symbolSize": 200}}
# A click on the legend leaves one build and dims the others.
CHOICE = [{"name": "chosen", "select": {"type": "point", "fields": ["build"]}, "bind": "legend"}]
DIMMED: Spec = {"condition": {"param": "chosen", "value": 1}, "value": 0.15}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture: what it shows, in words, and as a Vega-Lite specification."""

    title: str
    spec: Spec

    @property
    def svg(self) -> str:
        """Drawn, with all text escaped."""
        import vl_convert

        return vl_convert.vegalite_to_svg(self.spec)


@cache
def script(own: str) -> str:
    """The plotting library and our `own` script, which knows its `vegaEmbed`, as one script. Takes seconds."""
    import vl_convert

    return vl_convert.javascript_bundle(own)


def three_way_front(report: Report) -> tuple[bool, ...]:
    """Per candidate: is none as good in accuracy, size and speed, and better in one?"""
    return pareto_front([(c.accuracy.kl.mean, c.bytes, _slowness(c)) for c in report.candidates])


def _slowness(candidate: CandidateResult) -> float:
    return -candidate.latency.tokens_per_second.median if candidate.latency else math.nan


def trade_offs(report: Report) -> tuple[Picture, ...]:
    """KL over size, and over speed, of every candidate; the fronts are marked."""
    rows = _builds(report)
    timed = [row for row in rows if "speed" in row]
    pictures = [_trade_off("Accuracy against size", rows, "size", "MB, less is better", 1)]
    if timed:
        pictures.append(_trade_off("Accuracy against speed", timed, "speed", "tokens/s, more is better", -1))
    return tuple(pictures)


def _builds(report: Report) -> Rows:
    rows: Rows = []
    for name, candidate, front in zip(_names(report), report.candidates, three_way_front(report), strict=True):
        kl = candidate.accuracy.kl
        error = kl.stderr if math.isfinite(kl.stderr) else 0.0
        row: dict[str, Any] = {
            "build": name,
            "front": front,
            "mean": kl.mean,
            "KL": max(kl.mean, LEAST_KL),
            "KL low": max(kl.mean - error, LEAST_KL),
            "KL high": max(kl.mean + error, LEAST_KL),
            "size": candidate.bytes / 1e6,
        }
        if candidate.latency:
            speed = candidate.latency.tokens_per_second
            row |= {"speed": speed.median, "speed low": speed.min, "speed high": speed.max}
        rows.append(row)
    return rows


def _trade_off(title: str, rows: Rows, across: str, unit: str, sign: int) -> Picture:
    marked = pareto_front([(row["mean"], sign * row[across]) for row in rows])
    rows = [{**row, "joined": on} for row, on in zip(rows, marked, strict=True)]
    x: Spec = {"field": across, "type": "quantitative", "title": unit, "scale": {"zero": False, "padding": 12}}
    y: Spec = {"field": "KL", "type": "quantitative", "title": "KL, nats a token, less is better"}
    lowest, highest = (math.log10(value) for value in (min(r["KL low"] for r in rows), max(r["KL high"] for r in rows)))
    powers = [10.0**power for power in range(math.floor(lowest), 1 + math.ceil(highest))]
    y |= {"scale": {"type": "log", "padding": 12}, "axis": {"format": "~g", "values": powers}}
    thin: Spec = {"type": "rule", "color": "var(--quiet)"}
    layers: list[Spec] = [
        {
            "transform": [{"filter": "datum.joined"}],
            "mark": {"type": "line", "color": "var(--quiet)", "strokeDash": [4, 3]},
            "encoding": {"x": x, "y": y},
        },
        {"mark": thin, "encoding": {"x": x, "y": {**y, "field": "KL low"}, "y2": {"field": "KL high"}}},
    ]
    if across == "speed":
        spread = {"x": {**x, "field": "speed low"}, "x2": {"field": "speed high"}, "y": y}
        layers.append({"mark": thin, "encoding": spread})
    tips = [("build", None, "build"), ("mean", ".3~g", "KL, nats"), ("size", ".1f", "MB"), ("speed", ".0f", "tokens/s")]
    points: Spec = {
        "params": CHOICE,
        "mark": {"type": "point", "size": 90, "strokeWidth": 2},
        "encoding": {
            "x": x,
            "y": y,
            "stroke": BUILD,
            "fill": BUILD,
            "shape": BUILD,
            "opacity": DIMMED,
            "fillOpacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.1},
            "tooltip": [
                {"field": name, "type": "quantitative" if form else "nominal", "format": form or "", "title": words}
                for name, form, words in tips
                if name in rows[0]
            ],
        },
    }
    return _picture(title, rows, {"layer": [*layers, points]})


# A part of a layer -> its fidelity; None where the layer has no such part.
LAYER_PARTS: Mapping[str, Callable[[LayerFidelity], Fidelity | None]] = {
    "Attention": lambda layer: layer.attention,
    "Feed-forward, shared": lambda layer: layer.feed_forward,
    "Worst expert": worst_answer,
    "Residual stream behind the layer": lambda layer: layer.after,
}


def layer_pictures(report: Report) -> tuple[Picture, ...]:
    """Signal-to-noise of each part over the layers, and how often the same experts are chosen; of candidates looked into."""
    layers = [(name, layer) for name, insides in _looked_into(report) for layer in insides.layers]
    pictures = [
        _over_layers(
            title,
            [(name, layer, found.signal_to_noise) for name, layer in layers if (found := part(layer)) is not None],
            "signal-to-noise, dB",
            ".1f",
        )
        for title, part in LAYER_PARTS.items()
    ]
    routed = [(name, layer, share) for name, layer in layers if (share := layer.router_agreement) is not None]
    pictures.append(_over_layers("Same experts chosen", routed, "share of tokens", ".1%"))
    return tuple(picture for picture in pictures if picture.spec["data"]["values"])


def _over_layers(title: str, values: Sequence[tuple[str, LayerFidelity, float]], unit: str, form: str) -> Picture:
    rows: Rows = [
        {"build": name, "layer": layer.layer, "value": _finite(value, 4), "drawn": min(max(value, 0.0), MOST_DECIBELS)}
        for name, layer, value in values
    ]
    axis = {"format": ".0%"} if form.endswith("%") else {}
    encoding: Spec = {
        "x": {"field": "layer", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}},
        "y": {"field": "drawn", "type": "quantitative", "title": unit, "scale": {"zero": False}, "axis": axis},
        "color": LINE,
        "strokeDash": LINE,
        "opacity": DIMMED,
        "tooltip": [
            {"field": "build", "type": "nominal"},
            {"field": "layer", "type": "quantitative"},
            {"field": "value", "type": "quantitative", "title": unit, "format": form},
        ],
    }
    mark: Spec = {"type": "line", "strokeWidth": 1.5, "point": {"size": 20, "strokeDash": [1, 0]}}
    return _picture(title, rows, {"params": CHOICE, "mark": mark, "encoding": encoding})


def expert_pictures(report: Report) -> tuple[Picture, ...]:
    """How many tokens visit each expert, and each candidate's signal-to-noise there; none where they would be too large."""
    looked = _looked_into(report)
    cells = sum(len(layer.experts) for _, insides in looked for layer in insides.layers)
    if not 0 < cells <= MOST_CELLS:
        return ()
    # The reference's choice, in every candidate alike.
    visits = [(layer.layer, e, float(e.tokens)) for layer in looked[0][1].layers for e in layer.experts]
    pictures = [_by_expert("Tokens that the reference sends to each expert", visits, TOKENS, "tokens", "d", False)]
    for name, insides in looked:
        answers = [(i.layer, e, e.answer.signal_to_noise) for i in insides.layers for e in i.experts if e.both]
        pictures.append(_by_expert(f"{name}: signal-to-noise of each expert", answers, DECIBELS, "dB", ".1f", True))
    return tuple(pictures)


def _looked_into(report: Report) -> list[tuple[str, LayerByLayer]]:
    named = zip(_names(report), report.candidates, strict=True)
    return [(name, candidate.insides) for name, candidate in named if candidate.insides]


def _names(report: Report) -> list[str]:
    """What candidates are called in pictures: those of one name are counted, or they would be taken for one."""
    names = [candidate.name for candidate in report.candidates]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _finite(value: float, digits: int) -> float | None:
    """Rounded; None, JSON's only word for it, where nothing differs or nothing is right."""
    return round(value, digits) if math.isfinite(value) else None


def _by_expert(
    title: str,
    values: Sequence[tuple[int, ExpertFidelity, float]],
    steps: Sequence[int],
    unit: str,
    form: str,
    less_is_worse: bool,
) -> Picture:
    bands = [f"below {steps[0]}", *(f"{low} to {high}" for low, high in pairwise(steps)), f"{steps[-1]} or more"]
    colours = [f"var(--heat{i})" for i in range(len(bands))]
    rows: Rows = [
        {
            "layer": layer,
            "expert": e.expert,
            "value": _finite(value, 1),
            "band": bisect_right(steps, value),
        }
        for layer, e, value in values
    ]
    encoding: Spec = {
        "x": {"field": "layer", "type": "ordinal", "scale": {"padding": 0}, "axis": {"labelAngle": 0}},
        "y": {"field": "expert", "type": "ordinal", "scale": {"padding": 0}},
        "color": {
            "field": "band",
            "type": "ordinal",
            "scale": {"domain": list(range(len(bands))), "range": colours[::-1] if less_is_worse else colours},
            "legend": {
                "columns": 4,
                "symbolType": "square",
                "title": unit,
                "labelExpr": f"{json.dumps(bands)}[datum.value]",
            },
        },
        "tooltip": [
            {"field": "layer", "type": "ordinal"},
            {"field": "expert", "type": "ordinal"},
            {"field": "value", "type": "quantitative", "title": unit, "format": form},
        ],
    }
    # Whole pixels: a cell's outline in digits is most of what the picture weighs.
    layers, experts = (max(1, len({row[key] for row in rows})) for key in ("layer", "expert"))
    steps_xy = {"width": {"step": max(4, WIDTH // layers)}, "height": {"step": max(4, min(12, HEIGHT // experts))}}
    return _picture(title, rows, {"mark": {"type": "rect"}, "encoding": encoding, **steps_xy})


def _picture(title: str, rows: Rows, spec: Spec) -> Picture:
    # The title stays out of the specification: it may hold a name, and a page can wrap it.
    return Picture(
        title=title,
        spec={"width": WIDTH, "height": HEIGHT, "data": {"values": rows}, "config": CONFIG, **spec},
    )
