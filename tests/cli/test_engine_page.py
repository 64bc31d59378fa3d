"""The page of an engine: all of it there without scripts, hostile names harmless, nothing fetched, no error in a browser."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.cli.formats import TIMES
from corral.graphs.hash_files import hash_files
from corral.spec.bundle import open_bundle
from corral.spec.manifest import MANIFEST_NAME, EngineRecord

Corral = Callable[..., Any]
Parsed = Callable[[str], Any]
TinyBundle = Callable[[str, str, str], Path]

HOSTILE = "</script></code><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}\"' & co"


def kernel(name: str, kind: str, *layers: str, writes: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"name": name, "kind": kind, "layers": list(layers), "writes": list(writes)}


EXPERTS = "layers.1.feed_forward.experts.down_proj.DequantizeLinear"
SIDECAR: dict[str, Any] = {
    "built_with": "tensorrt_rtx 1.7.1.116",
    "graph": "decoder.onnx",
    "capabilities": ["8.9"],
    "bytes": 3_000_000,
    "weight_bytes": 1_500_000,
    "expected_weight_bytes": 1_490_000,
    "profiles": [
        {
            "name": "decode",
            "axes": {"batch": [1, 1, 8], "tokens": [1, 1, 1]},
            "weights": {"half": 400_000, "int4": 1_100_000},
            "scratch_bytes": 250_000,
            "kernels": [
                kernel("_gemv_mha_v1", "function", "layers.0.self_attn.core.Attention"),
                kernel(
                    "__myl_Fc", "runtime_fusion", "layers.0.o_proj.weight.DequantizeLinear", "layers.0.o_proj.MatMul"
                ),
                kernel(HOSTILE, "function", f"layers.1.{HOSTILE}"),
                kernel("__myl_Gath", "function", EXPERTS, writes=({"shape": ["__mye1", 64, 32], "type": "half"},)),
                kernel("lm_head.MatMul", "fully_connected", "lm_head.MatMul"),
            ],
            "unfused_weights": [
                {
                    "kernel": "__myl_Gath",
                    "layers": [EXPERTS],
                    "writes": [{"shape": ["__mye1", 64, 32], "type": "half", "known_bytes": 4096}],
                }
            ],
        },
        {"name": "prefill", "axes": {"batch": [1, 1, 1], "tokens": [1, 16, 16]}},
    ],
}


@pytest.fixture
def engine_bundle(tiny_bundle: TinyBundle, tmp_path: Path) -> Path:
    """A bundle with an engine that is no engine, beside a sidecar as a builder might have written it."""
    directory = tmp_path / "tiny-engine"
    shutil.copytree(tiny_bundle("scout", "tensorrt-rtx", "int4"), directory)
    (directory / "d.engine").write_bytes(b"not really")
    put_sidecar(directory, SIDECAR)
    return directory


def put_sidecar(directory: Path, sidecar: Any) -> None:
    manifest = open_bundle(directory).manifest
    (directory / "d.engine.json").write_text(json.dumps(sidecar))
    record = EngineRecord(
        path="d.engine",
        sidecar="d.engine.json",
        graph="decoder.onnx",
        capabilities=("8.9",),
        built_with="tensorrt_rtx 1.7.1.116",
        profiles=("decode", "prefill"),
    )
    files = tuple(file for file in manifest.files if not file.path.startswith("d.engine"))
    files += hash_files(directory, ["d.engine", "d.engine.json"])
    listed = dataclasses.replace(manifest, stage="ready", engines=(record,), files=files)
    (directory / MANIFEST_NAME).write_text(listed.dumps())


@pytest.fixture
def page(corral: Corral, engine_bundle: Path, tmp_path: Path) -> Path:
    out = tmp_path / "engine.html"
    said = corral("inspect", engine_bundle, "--html", out).stdout
    assert "complete by itself" in said
    return out


def test_everything_is_said_without_a_script(page: Path, parsed: Parsed) -> None:
    found = parsed(page.read_text())
    said = " ".join(found.text.split())
    for expected in (
        "3.0 MB, built by tensorrt_rtx 1.7.1.116 of decoder.onnx",
        "compute capability 8.9: L40S 48 GB, L4 24 GB, RTX 4090 24 GB",
        "1.5 MB in the file, 1.5 MB by their bits",
        "batch 1 to 8, tokens 1 to 1",
        "5 kernels; device memory besides weights and caches: 250.0 kB",
        "chunked: 4 layers, 16 rows, float16: 8.2 kB a sequence",
        "global: 1 layer, 8,192 rows, float16: 1.0 MB a sequence",
        "int4 1.1 MB 73.3 %",
        f"n {TIMES} 64 {TIMES} 32 half 4.1 kB a block",
        "attention: 1 matrix product that dequantizes its weights on the way: 1 matrix product: 1 "
        "writes dequantized weights to memory: 1 everything else: 1",
        "layer 0 kernels 1 to 2",
        "layer 1 kernels 3 to 4",
        "Its schedule could not be read",
    ):
        assert expected in said
    roles = [attributes["class"] for tag, attributes in found.tags if tag == "li" and "id" in attributes]
    assert roles == ["attention", "packed", "other", "unpacked", "matrix"]


def test_the_data_are_in_the_page_as_they_were(page: Path, parsed: Parsed) -> None:
    assert json.loads(parsed(page.read_text()).data["engines"]) == {"d.engine": SIDECAR}


def test_weights_that_are_left_dequantized_are_listed_with_what_they_take(corral: Corral, engine_bundle: Path) -> None:
    """Equal kernels of several layers are one row; bytes of a block, and of the largest step."""
    written = {"shape": ["__mye1", 64, 32], "type": "half", "most_bytes": 9 * 4096, "known_bytes": 4096}
    kernels = [{"kernel": "__myl_Gath", "layers": [EXPERTS.replace("1", str(i))], "writes": [written]} for i in (1, 3)]
    decode, prefill = SIDECAR["profiles"]
    put_sidecar(engine_bundle, SIDECAR | {"profiles": [decode | {"unfused_weights": kernels}, prefill]})
    said = corral("inspect", engine_bundle, "--engine").stdout
    (row,) = [
        line.split() for line in said.splitlines() if "experts.down_proj.DequantizeLinear" in line and "4.1" in line
    ]
    assert row == ["2", "feed_forward.experts.down_proj.DequantizeLinear", "4.1", "kB", "36.9", "kB"]


def test_a_hostile_name_stays_a_name(page: Path, parsed: Parsed) -> None:
    found = parsed(page.read_text())
    assert HOSTILE in found.text
    assert (found.count("img"), found.count("script")) == (0, 2)


def test_nothing_is_fetched(page: Path, parsed: Parsed) -> None:
    found = parsed(page.read_text())
    links = {key: value for _, given in found.tags for key, value in given.items() if key in ("src", "href", "action")}
    assert all(value and value.startswith("#") for value in links.values())
    policy = next(given["content"] for _, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_the_page_without_complaint(page: Path, parsed: Parsed, tmp_path: Path) -> None:
    """A violation of the page's own policy (a wrong digest of script or style) would be an error on the console, too."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    (given,) = [given for tag, given in parsed(done.stdout).tags if tag == "p" and given.get("id") == "filter"]
    assert "hidden" not in given  # the script has shown the filter


def test_a_damaged_sidecar_is_refused_and_the_page_not_written(
    corral: Corral, engine_bundle: Path, tmp_path: Path
) -> None:
    put_sidecar(engine_bundle, SIDECAR | {"profiles": [{"name": "decode", "axes": {"batch": ["x"]}}]})
    result = corral("inspect", engine_bundle, "--html", tmp_path / "engine.html", code=2)
    assert "axes.batch[0] is 'x', expected int: the file is damaged" in result.stderr
    assert not (tmp_path / "engine.html").exists()


def test_html_is_for_engines(corral: Corral, tiny_bundle: TinyBundle, engine_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.html"
    assert "--html shows engines" in corral("inspect", engine_bundle, "--files", "--html", out, code=2).stderr
    assert "has no engine" in corral("inspect", tiny_bundle("scout", "cpu", "int4"), "--html", out, code=2).stderr
    assert (
        "lies in no such directory" in corral("inspect", engine_bundle, "--html", tmp_path / "no/x.html", code=2).stderr
    )
