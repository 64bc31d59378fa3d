"""A manifest survives its file, and a damaged, foreign or hostile one is refused with a reason."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.spec.errors import InputError
from corral.spec.kv_layout import kv_layouts
from corral.spec.manifest import (
    MANIFEST_BYTES,
    MANIFEST_NAME,
    CoverageRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    TensorRecord,
    read_manifest,
)
from corral.spec.model_config import parse_config
from corral.spec.recipe import Recipe


@pytest.fixture(scope="module")
def manifest(tiny_config: Callable[[str], dict[str, Any]]) -> Manifest:
    config = parse_config(tiny_config("scout"))
    names = ("model.onnx", "weights/0.bin", "embedding.bin", "tokenizer.json", "chat_template.jinja")
    return Manifest(
        format="1.0",
        corral="0.1.0",
        stage="ready",
        model=config,
        recipe=Recipe(group_size=32),
        requires={"onnxruntime": "1.31"},
        source={"path": "scout"},
        graphs=(GraphRecord(path="model.onnx", first_layer=0, end_layer=5),),
        kv=kv_layouts(config),
        embedding=TensorRecord(path="embedding.bin", dtype="float32", shape=(320, 64), offset=0),
        coverage=(CoverageRecord(kind="experts", stored="int4 g32", matrices=80, parameters=12, bytes=7),),
        tokenizer="tokenizer.json",
        chat_template="chat_template.jinja",
        special_tokens={"bos_token": "<b>"},
        files=tuple(FileRecord(path=name, bytes=10, sha256="0" * 64) for name in names),
    )


@pytest.fixture
def write(manifest: Manifest, tmp_path: Path) -> Callable[..., Path]:
    """`write(change)`: save the manifest after `change` has altered its JSON; the bundle's directory."""

    def save(change: Callable[[dict[str, Any]], object] = lambda _data: None) -> Path:
        data = json.loads(manifest.dumps())
        change(data)
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
        return tmp_path

    return save


def test_round_trip(manifest: Manifest, write: Callable[..., Path]) -> None:
    assert read_manifest(write()) == manifest
    assert manifest.bytes == 50
    assert manifest.dumps() == read_manifest(write()).dumps()


def test_optional_parts_may_be_absent(write: Callable[..., Path]) -> None:
    def strip(data: dict[str, Any]) -> None:
        data.update(embedding=None, tokenizer=None, chat_template=None)
        data["model"].update(rope_scaling=None, bos_token_id=None)
        del data["special_tokens"]

    read = read_manifest(write(strip))
    assert (read.embedding, read.tokenizer, read.special_tokens, read.model.rope_scaling) == (None, None, {}, None)


def test_a_newer_minor_version_may_say_more(write: Callable[..., Path], manifest: Manifest) -> None:
    def newer(data: dict[str, Any]) -> None:
        data.update(format="1.7", speculative={"draft": "x"})
        data["files"][0]["mode"] = 420

    assert read_manifest(write(newer)).files == manifest.files


@pytest.mark.parametrize("version", ["2.0", "0.9", "", "one", None, 2, ["1"]])
def test_another_major_version_is_refused(write: Callable[..., Path], version: Any) -> None:
    with pytest.raises(InputError, match=r"is of bundle format .*; this corral reads 1\.x"):
        read_manifest(write(lambda data: data.update(format=version)))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "a\\b", "C:x", "a\0b"])
@pytest.mark.parametrize("place", ["files", "graphs", "embedding", "tokenizer", "chat_template"])
def test_a_path_may_not_lead_outside(write: Callable[..., Path], place: str, path: str) -> None:
    def lead_out(data: dict[str, Any]) -> None:
        if isinstance(data[place], str):
            data[place] = path
        else:
            (data[place] if place == "embedding" else data[place][0])["path"] = path

    with pytest.raises(InputError, match="outside the bundle"):
        read_manifest(write(lead_out))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.pop("graphs"), "lacks graphs"),
        (lambda d: d["files"][0].pop("sha256"), r"files\[0\] lacks sha256"),
        (lambda d: d.update(stage="half"), "stage is 'half'"),
        (lambda d: d.update(files={}), "files is '{}'"),
        (lambda d: d.update(tokenizer=3), "tokenizer is '3', expected str"),
        (lambda d: d["files"][0].update(bytes=-1), r"bytes is '-1', expected int"),
        (lambda d: d["files"][0].update(bytes=True), r"bytes is 'True', expected int"),
        (lambda d: d["files"][0].update(bytes=1.5), r"bytes is '1\.5', expected int"),
        (lambda d: d["requires"].update(x=3), r"requires\.x is '3', expected str"),
        (lambda d: d["model"].update(layers=[{}]), r"layers\[0\] lacks kv_class, moe, rope"),
        (lambda d: d["model"]["layers"][0].update(kv_class="sliding"), "kv_class is 'sliding'"),
        (lambda d: d["model"].update(num_key_value_heads=3), "not a multiple"),
        (lambda d: d["model"].update(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (lambda d: d["recipe"].update(weights="int5"), 'weights "int5" are not known'),
        (lambda d: d.update(tokenizer="other.json"), 'names "other.json" but does not list it'),
        (lambda d: d["graphs"][0].update(path="other.onnx"), 'names "other.onnx" but does not list it'),
    ],
)
def test_refusals(write: Callable[..., Path], change: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_manifest(write(change))


def test_directories_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a bundle"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no manifest\.json: it is no bundle, or an unfinished compile"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000], ids=["cut", "not text", "deep"])
def test_a_manifest_that_is_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(InputError, match="not readable JSON"):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(MANIFEST_BYTES + 1)  # sparse
    with pytest.raises(InputError, match="a manifest has at most"):
        read_manifest(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused(
    manifest: Manifest, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = json.loads(manifest.dumps())
    place = content
    while True:  # walk down to a random value, and change that
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    directory = tmp_path_factory.getbasetemp()
    (directory / MANIFEST_NAME).write_text(json.dumps(content))
    with contextlib.suppress(InputError):
        assert isinstance(read_manifest(directory), Manifest)
