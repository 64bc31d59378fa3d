"""A comparison as a page: all of it there without scripts, hostile names harmless, nothing fetched, no error in a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.spec.errors import CheckFailed
from corral.spec.manifest import read_manifest
from corral.validate.accuracy import Accuracy
from corral.validate.greedy import GreedyDivergence
from corral.validate.latency import Latency
from corral.validate.layers import ExpertFidelity, Fidelity, LayerByLayer, LayerFidelity
from corral.validate.report import CandidateResult, Measured, ReferenceResult, Report
from corral.validate.statistics import Distribution, Estimate, Quantiles, Spread
from corral.validate.tasks import TaskScore

pytest.importorskip("vl_convert", reason="needs the extra report")

Corral = Callable[..., Any]
Parsed = Callable[[str], Any]
BUILDS = (("cpu", "fp32"), ("cpu", "int8"), ("cpu", "int4"), ("portable", "int8"), ("portable", "int4"))
HOSTILE = "</script></code></svg><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}\"' & co"
MEASURED = Measured(
    predictions=100, windows=2, window=50, prompt_tokens=4, decode_tokens=4, repeats=1, threads=1, provider="cpu"
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What `corral validate --html --json` left and printed."""

    page: Path
    html: str
    printed: Any
    stderr: str
    command: list[str]
    candidates: list[Path]


@pytest.fixture(scope="module")
def made(corral: Corral, tiny_checkpoint: Any, tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Five builds of a tiny checkpoint compared; the gate is one that quantized weights break."""
    directory = tmp_path_factory.mktemp("report")
    ids, page = directory / "ids.json", directory / "re port.html"
    ids.write_text(json.dumps(np.random.default_rng(5).integers(0, 256, 200).tolist()))
    candidates = [tiny_bundle("two_layers", target, weights) for target, weights in BUILDS]
    command = [
        "validate",
        tiny_checkpoint("two_layers"),
        *candidates,
        "--token-ids",
        ids,
        "--window",
        50,
        "--repeats",
        1,
    ]
    command = [*map(str, command), "--inside", "--max-kl", "1e-06", "--html", str(page), "--json"]
    result = corral(*command, code=1)
    return Made(page, page.read_text(), json.loads(result.stdout), result.stderr, command, candidates)


def test_a_gate_that_fails_still_leaves_the_page(made: Made, parsed: Parsed) -> None:
    """Exit code 1 is asserted where it is made."""
    assert "mean KL divergence is" in made.stderr and "complete by itself" in made.stderr
    said = " ".join(parsed(made.html).text.split())
    assert "A check failed (exit code 1): " in said
    assert made.stderr.split("error: ")[1].strip() in said


def test_the_data_are_what_json_prints(made: Made, parsed: Parsed) -> None:
    assert json.loads(parsed(made.html).data["report"]) == made.printed
    assert len(made.printed["candidates"]) == len(BUILDS)


def test_everything_is_said_without_a_script(made: Made, parsed: Parsed) -> None:
    found = parsed(made.html)
    said = " ".join(found.text.split())
    for candidate, data in zip(made.candidates, made.printed["candidates"], strict=True):
        assert said.count(candidate.name) >= 5  # in each table, and at its recipe
        assert f"{data['insides']['layers'][0]['attention']['signal_to_noise']:.1f}" in said
    assert found.count("svg") == found.count("figure") == 2 + 5 + 1 + len(BUILDS)
    assert "nothing is broken" in said and "the noisiest experts" in said


def test_recipes_and_the_command_are_those_that_made_it(made: Made, parsed: Parsed) -> None:
    import shlex

    text = parsed(made.html).text
    for candidate in made.candidates:
        assert read_manifest(candidate).recipe.to_toml() in text
        assert f"-o {candidate.name} --recipe recipe.toml" in text
    (line,) = (line for line in text.splitlines() if line.startswith("corral validate"))
    words = shlex.split(line)
    assert sorted(words) == sorted(["corral", *made.command])
    assert words[2 : 3 + len(BUILDS)] == made.command[1 : 2 + len(BUILDS)]


def test_nothing_is_fetched(made: Made, parsed: Parsed) -> None:
    found = parsed(made.html)
    links = [v for _, given in found.tags for k, v in given.items() if k in ("src", "href", "xlink:href", "action")]
    assert links == []
    policy = next(given["content"] for _, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_a_hostile_name_stays_a_name(parsed: Parsed) -> None:
    from corral.cli.report_page import RecipeView, report_page

    score = TaskScore(
        build=HOSTILE, task=HOSTILE, metric="acc,none", value=0.5, stderr=None, documents=2, published=0.743
    )
    report = dataclasses.replace(made_up(HOSTILE, layers=2, experts=4), tasks=(score,))
    recipe = RecipeView(name=HOSTILE, toml=HOSTILE, command=HOSTILE, source=HOSTILE, corral="1")
    found = parsed(report_page(report, [recipe], HOSTILE, CheckFailed(HOSTILE)))
    assert found.text.count(HOSTILE) >= 10
    assert "74.3 %" in found.text and "MTOB" in found.text  # published, and not measured here
    assert (found.count("img"), found.count("script")) == (0, 3)
    assert json.loads(found.data["report"])["candidates"][0]["name"] == HOSTILE


@pytest.mark.parametrize(("builds", "drawn"), [(5, True), (6, False)])
def test_five_builds_of_maverick_fit_into_5_megabytes_and_more_leave_pictures_out(
    parsed: Parsed, builds: int, drawn: bool
) -> None:
    """24 layers with 128 experts each."""
    from corral.cli.report_page import RecipeView, report_page

    report = made_up(*(f"build {i}" for i in range(builds)), layers=24, experts=128)
    html = report_page(report, [RecipeView(name="x")] * builds, "corral validate")
    assert len(html.encode()) < 5e6
    assert ("too many experts to draw" in html) is not drawn
    assert parsed(html).count("figure") == 2 + 5 + (1 + builds if drawn else 0)


def test_the_front_is_marked_in_the_table_and_in_the_pictures() -> None:
    from corral.cli.report_page import _overview
    from corral.cli.report_pictures import trade_offs

    base = made_up("a", "b", "c", layers=0, experts=0)
    # KL, bytes, tokens/s: b is the smallest; c is beaten by a in everything.
    facts = ((0.1, 300, 50.0), (0.2, 200, 40.0), (0.3, 400, 30.0))
    changed = [changed_result(c, *fact) for c, fact in zip(base.candidates, facts, strict=True)]
    report = dataclasses.replace(base, candidates=tuple(changed))
    assert [row[-1] for row in _overview(report).rows] == ["", "yes", "yes", "no"]
    by_size, by_speed = ([row["joined"] for row in p.spec["data"]["values"]] for p in trade_offs(report))
    assert by_size == [True, True, False]
    assert by_speed == [True, False, False]


def test_builds_of_one_name_are_told_apart_in_pictures() -> None:
    from corral.cli.report_pictures import trade_offs

    report = made_up("a", "b", "a", layers=0, experts=0)
    assert [row["build"] for row in trade_offs(report)[0].spec["data"]["values"]] == ["a (1)", "b", "a (2)"]


def test_builds_that_equal_the_reference_are_drawn() -> None:
    """KL of 0 has no logarithm, and noise of 0 no ratio."""
    from corral.cli.report_pictures import layer_pictures, trade_offs

    report = made_up("same", layers=2, experts=2, decibels=math.inf)
    same = dataclasses.replace(report, candidates=(changed_result(report.candidates[0], 0.0, 10, 1.0),))
    for picture in (*trade_offs(same), *layer_pictures(same)):
        json.dumps(picture.spec, allow_nan=False)
        assert "NaN" not in picture.svg


def test_dense_models_and_checkpoints_have_what_can_be_said_of_them(parsed: Parsed, tiny_checkpoint: Any) -> None:
    """No experts; no speed, no recipe."""
    from corral.cli.report_page import recipe_view, report_page

    report = made_up("dense", layers=2, experts=0)
    untimed = dataclasses.replace(report.candidates[0], latency=None)
    page = report_page(dataclasses.replace(report, candidates=(untimed,)), [recipe_view(tiny_checkpoint("guard"))], "")
    said = parsed(page).text
    assert "Layer by layer" in said and "Expert by expert" not in said
    assert "Accuracy against size" in said and "Accuracy against speed" not in said
    assert "No bundle, so no recipe" in said


def test_a_missing_library_is_named_before_anything_is_measured(
    corral: Corral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.delitem(sys.modules, "corral.cli.report_page", raising=False)
    ids = tmp_path / "ids.json"
    result = corral("validate", "a", "b", "--token-ids", ids, "--html", tmp_path / "x.html", code=3)
    assert 'pip install "corral[report]"' in result.stderr


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(corral: Corral, tmp_path: Path) -> None:
    result = corral("validate", "a", "b", "--token-ids", "ids", "--html", tmp_path / "no/x.html", code=2)
    assert "lies in no such directory" in result.stderr


# A page around the page, as narrow as a phone if need be; what it finds there it writes down as JSON.
FRAME = """<!doctype html><iframe width={width} height=700 src="{page}"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const inner = frame.contentDocument, wait = setInterval(() => {{
    const drawn = inner.querySelectorAll("[data-drawn]").length;
    if (drawn < inner.querySelectorAll("figure").length) return;
    clearInterval(wait);
    const mark = inner.querySelector(".mark-symbol path[fill-opacity]") ?? inner.querySelector(".mark-symbol path");
    mark.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", {{ bubbles: true }}));
    const said = inner.querySelector("#vg-tooltip-element")?.textContent;
    const width = inner.documentElement.scrollWidth;
    document.querySelector("pre").textContent = JSON.stringify({{ drawn, said, width }});
  }}, 50);
}};
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1000, True), (360, False)])
def test_a_browser_runs_the_page_without_complaint(made: Made, tmp_path: Path, width: int, dark: bool) -> None:
    """In light and dark, on a screen and on a phone: all is drawn, answers the pointer, and fits the width."""
    frame, shot = tmp_path / "frame.html", tmp_path / "shot.png"
    frame.write_text(FRAME.format(width=width, page=made.page.as_uri()))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000"]
    chromium = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*chromium, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(done.stdout.split("<pre>")[1].split("</pre>")[0])
    assert found["drawn"] == 2 + 5 + 1 + len(BUILDS)
    assert "build" in found["said"] and "tokens/s" in found["said"]
    assert found["width"] <= width
    subprocess.run(
        [*chromium, f"--screenshot={shot}", made.page.as_uri()], check=True, capture_output=True, timeout=120
    )
    assert first_pixel(shot) == ((13, 17, 23) if dark else (255, 255, 255))


def first_pixel(png: Path) -> tuple[int, ...]:
    """Of a PNG: nothing lies before it, so that whatever the filter of its row, it is stored as it is."""
    data, position, packed = png.read_bytes(), 8, b""
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            packed += data[position + 8 : position + 8 + length]
        position += 12 + length
    return tuple(zlib.decompress(packed)[1:4])


def made_up(*names: str, layers: int, experts: int, decibels: float = 17.123456789012345) -> Report:
    """A comparison nobody measured."""
    part, estimate = Fidelity(signal_to_noise=decibels, gain=0.9876543210123456), Estimate(0.9, 0.01)
    inside = LayerByLayer(
        tokens=4096,
        embeddings=part,
        layers=tuple(
            LayerFidelity(
                layer=layer,
                attention=part,
                positions=(),
                router=part,
                router_agreement=0.9876543210123456,
                feed_forward=part,
                experts=tuple(ExpertFidelity(expert=e, tokens=1234, both=1201, answer=part) for e in range(experts)),
                after=part,
            )
            for layer in range(layers)
        ),
        logits=part,
    )
    spread = Spread(median=10.0, min=9.0, max=11.0, p25=9.5, p75=10.5, n=5)
    none = Quantiles(p50=None, p95=None, p99=None, n=0)
    latency = Latency(tokens_per_second=spread, time_to_first_token=spread, first_tokens=none, between_tokens=none)
    accuracy = Accuracy(
        kl=Distribution(mean=0.01, stderr=math.nan, p50=0.01, p95=0.02, p99=0.03, max=0.04),
        top1_agreement=estimate,
        top5_agreement=estimate,
        perplexity=estimate,
        perplexity_ratio=estimate,
    )
    candidates = tuple(
        CandidateResult(
            name=name,
            bytes=1000,
            accuracy=accuracy,
            latency=latency,
            greedy=GreedyDivergence(alike=(4,), tokens=4),
            insides=inside if layers else None,
        )
        for name in names
    )
    reference = ReferenceResult(name="reference", kind="checkpoint", bytes=4000, perplexity=estimate, latency=None)
    return Report(reference=reference, candidates=candidates, measured=MEASURED)


def changed_result(result: CandidateResult, kl: float, size: int, speed: float) -> CandidateResult:
    assert result.latency is not None
    divergence = dataclasses.replace(result.accuracy.kl, mean=kl)
    rate = dataclasses.replace(result.latency.tokens_per_second, median=speed)
    return dataclasses.replace(
        result,
        bytes=size,
        accuracy=dataclasses.replace(result.accuracy, kl=divergence),
        latency=dataclasses.replace(result.latency, tokens_per_second=rate),
    )
