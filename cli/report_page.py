"""A comparison as a page: tables that need no script, pictures that are drawn already, recipes, and the data as JSON.

The plotting library comes with the page and draws the pictures once more in the browser, to answer the pointer.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import vl_convert  # before any work: where it is missing, nobody should wait for a comparison first
from markupsafe import Markup

from corral.cli.bundle_view import origin
from corral.cli.page import page_file, render_page
from corral.cli.report_pictures import (
    LEAST_KL,
    MOST_DECIBELS,
    expert_pictures,
    layer_pictures,
    script,
    three_way_front,
    trade_offs,
)
from corral.cli.report_view import (
    accuracy_table,
    experts_table,
    how_measured,
    latency_table,
    layers_table,
    report_table,
    tasks_remark,
    tasks_table,
    verdict_words,
)
from corral.cli.tables import Table
from corral.cli.written_file import check_place, write_named
from corral.spec.errors import CheckFailed
from corral.spec.manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from corral.validate.report import Report


@dataclass(frozen=True, kw_only=True)
class RecipeView:
    """What a candidate was made by; empty for a checkpoint, which nobody made by a recipe."""

    name: str
    toml: str = ""
    command: str = ""
    source: str = ""
    corral: str = ""


@dataclass(frozen=True, kw_only=True)
class InsideView:
    """A candidate that was looked into."""

    name: str
    verdict: str
    layers: Table
    experts: Table


def check_page(path: Path) -> None:
    """Raise InputError where no page can be written, before anything is measured."""
    check_place(path, "--html")


def write_page(path: Path, report: Report, candidates: Sequence[Path], command: str, failed: CheckFailed | None) -> str:
    """Write the page of `report` on these candidates; returns what to say of it.

    `command` is what made it, `failed` what a gate said.
    """
    html = report_page(report, [recipe_view(candidate) for candidate in candidates], command, failed)
    return write_named(path, "--html", html.encode(), "complete by itself; open it in a browser")


def report_page(report: Report, recipes: Sequence[RecipeView], command: str, failed: CheckFailed | None = None) -> str:
    """The page, as HTML; less than 5 MB for five builds of the largest models."""
    pictures = {"trade_offs": trade_offs(report), "layers": layer_pictures(report), "experts": expert_pictures(report)}
    every = [picture for some in pictures.values() for picture in some]
    drawn = iter([(number, picture, Markup(picture.svg)) for number, picture in enumerate(every)])
    return render_page(
        "report_page",
        script=script(page_file("report_page.js")),
        title=report.reference.name,
        measured=how_measured(report),
        failed=failed,
        overview=_overview(report),
        accuracy=accuracy_table(report),
        latency=latency_table(report),
        insides=[
            InsideView(
                name=candidate.name,
                verdict=verdict_words(candidate),
                layers=layers_table(candidate),
                experts=experts_table(candidate.insides),
            )
            for candidate in report.candidates
            if candidate.insides
        ],
        tasks=tasks_table(report) if report.tasks else None,
        tasks_remark=tasks_remark(),
        recipes=recipes,
        command=command,
        version=_version(),
        vega=vl_convert.get_vega_version(),
        least_kl=f"{LEAST_KL:.5f}",
        most_decibels=f"{MOST_DECIBELS:.0f}",
        data=report.to_json(),
        specs=[picture.spec for picture in every],
        **{name: [next(drawn) for _ in some] for name, some in pictures.items()},
    )


def recipe_view(candidate: Path) -> RecipeView:
    """What its manifest says of how it was made."""
    name = candidate.resolve().name
    if not (candidate / MANIFEST_NAME).is_file():
        return RecipeView(name=name)
    manifest = read_manifest(candidate)
    source = origin(manifest)
    return RecipeView(
        name=name,
        toml=manifest.recipe.to_toml(),
        command=shlex.join(["corral", "compile", source, "-o", name, "--recipe", "recipe.toml"]),
        source=source,
        corral=manifest.corral,
    )


def _overview(report: Report) -> Table:
    """The table that a terminal shows, and who is on the front."""
    table = report_table(report)
    front = ["", *("yes" if on else "no" for on in three_way_front(report))]
    rows = [[*row, mark] for row, mark in zip(table.rows, front, strict=True)]
    return dataclasses.replace(table, columns=(*table.columns, "front"), rows=rows)


def _version() -> str:
    try:
        return version("corral")
    except PackageNotFoundError:
        return "(not installed)"
