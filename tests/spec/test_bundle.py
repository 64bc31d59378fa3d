"""Opening a bundle: every file as the manifest says, hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.spec.bundle import open_bundle, remember_verified
from corral.spec.errors import InputError
from corral.spec.kv_layout import kv_layouts
from corral.spec.manifest import FileRecord, GraphRecord, Manifest
from corral.spec.model_config import parse_config
from corral.spec.recipe import Recipe

CONTENT = {"graph.onnx": b"graph" * 100, "weights/0.bin": bytes(range(256)) * 5000}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "bundle"
    for name, data in CONTENT.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    model = parse_config(
        {
            "model_type": "llama4_text", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        }
    )  # fmt: skip
    manifest = Manifest(
        format="1.0",
        corral="0",
        stage="ready",
        model=model,
        recipe=Recipe(),
        requires={},
        source={},
        graphs=(GraphRecord(path="graph.onnx", first_layer=0, end_layer=1),),
        kv=kv_layouts(model),
        embedding=None,
        coverage=(),
        tokenizer=None,
        chat_template=None,
        files=tuple(
            FileRecord(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in CONTENT.items()
        ),
    )
    (directory / "manifest.json").write_text(manifest.dumps())
    return directory


def hashed_bytes(directory: Path) -> int:
    """How many bytes opening the bundle hashes."""
    done = [0.0]
    open_bundle(directory, progress=lambda what, n, total, unit: done.append(n))
    return int(done[-1])


def test_a_whole_bundle_opens_and_knows_its_files(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.path("weights/0.bin").read_bytes() == CONTENT["weights/0.bin"]
    assert opened.bytes == sum(map(len, CONTENT.values()))


def test_an_unchanged_bundle_is_hashed_once(bundle: Path) -> None:
    assert hashed_bytes(bundle) == sum(map(len, CONTENT.values()))
    assert hashed_bytes(bundle) == 0


def test_only_a_touched_file_is_hashed_again(bundle: Path) -> None:
    open_bundle(bundle)
    os.utime(bundle / "graph.onnx", ns=(1, 1))
    assert hashed_bytes(bundle) == len(CONTENT["graph.onnx"])


def test_a_copied_bundle_is_hashed_again(bundle: Path, tmp_path: Path) -> None:
    open_bundle(bundle)
    bundle.rename(tmp_path / "copy")
    assert hashed_bytes(tmp_path / "copy") > 0


def test_what_the_compiler_remembers_is_not_hashed(bundle: Path) -> None:
    remember_verified(open_bundle(bundle, verify=False))
    assert hashed_bytes(bundle) == 0


@pytest.mark.parametrize(
    "stamp", ["", "[]", '{"files": 3}', '{"files": {"graph.onnx": [1]}}', '{"files": {"a": null}}']
)
def test_an_unreadable_stamp_means_hashing(bundle: Path, tmp_path: Path, stamp: str) -> None:
    open_bundle(bundle)
    (path,) = (tmp_path / "cache/corral/verified").iterdir()
    path.write_text(stamp)
    assert hashed_bytes(bundle) == sum(map(len, CONTENT.values()))


def test_an_unwritable_cache_means_hashing_each_time(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed_bytes(bundle) == hashed_bytes(bundle) == sum(map(len, CONTENT.values()))


def test_a_flipped_byte_is_found_even_where_the_bundle_was_verified_before(bundle: Path) -> None:
    open_bundle(bundle)
    damaged = bytearray(CONTENT["weights/0.bin"])
    damaged[-1] ^= 1
    (bundle / "weights/0.bin").write_bytes(damaged)
    with pytest.raises(InputError, match=r"0\.bin has SHA-256 .*, expected"):
        open_bundle(bundle)


def test_without_verify_only_sizes_are_checked(bundle: Path) -> None:
    (bundle / "graph.onnx").write_bytes(CONTENT["graph.onnx"][::-1])
    open_bundle(bundle, verify=False)
    (bundle / "graph.onnx").write_bytes(CONTENT["graph.onnx"][:-1])
    with pytest.raises(InputError, match="has 499 bytes, expected 500"):
        open_bundle(bundle, verify=False)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_outside(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "has 493 bytes, expected 500"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "has 501 bytes, expected 500"),
        (replace_by_directory, "not a regular file"),
        (link_outside, "symbolic link"),
        (link_to_itself, "cannot be read"),
    ],
)
def test_a_file_that_is_not_as_listed_is_refused_by_name(
    bundle: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(bundle / "graph.onnx")
    with pytest.raises(InputError, match=says) as refusal:
        open_bundle(bundle)
    assert "graph.onnx" in str(refusal.value)


def test_a_link_inside_the_bundle_is_fine(bundle: Path) -> None:
    (bundle / "graph.onnx").rename(bundle / "real.onnx")
    (bundle / "graph.onnx").symlink_to("real.onnx")
    open_bundle(bundle)


def test_a_directory_that_is_linked_outside_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "weights").rename(tmp_path / "elsewhere")
    (bundle / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "", "a\0b"])
def test_a_path_that_leads_outside_is_refused(bundle: Path, name: str) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    data["files"].append({"path": name, "bytes": 1, "sha256": ""})
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="outside the bundle"):
        open_bundle(bundle)
    with pytest.raises(InputError, match="outside the bundle"):
        remember_verified(open_bundle(bundle, verify=False))
