"""Calibrated compiles: the same bytes whoever runs them, fallbacks by name, nothing left behind, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corral.graphs import compile, rehearse
from corral.graphs.calibrate.calibration_text import SHIPPED
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.spec.bundle import open_bundle
from corral.spec.errors import InputError
from corral.spec.manifest import Manifest
from corral.spec.recipe import Recipe

Checkpoint = Callable[[str], Path]
GPTQ = Recipe(method="gptq", group_size=32, calibration_tokens=8192)
WEIGHTS = "weights-00000.bin"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("maverick")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "bundle"
    compile(checkpoint, out, GPTQ, jobs=1)
    return out


def manifest_of(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def test_two_processes_make_the_same_bytes(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    compile(checkpoint, tmp_path / "pool", GPTQ, jobs=2)
    assert (tmp_path / "pool" / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()


def test_nothing_of_the_calibration_stays_but_its_record(bundle: Path) -> None:
    assert not [path for path in bundle.iterdir() if path.name.startswith(("statistics", "hidden", "compile"))]
    record = manifest_of(bundle).calibration
    assert record is not None
    assert (record.text, record.tokens, record.window) == ("python-library.txt", 8192, 512)
    assert set(record.expert_tokens) == {"layers.1.feed_forward.experts", "layers.3.feed_forward.experts"}
    assert all(sum(counts) == 8192 for counts in record.expert_tokens.values())


def test_experts_that_saw_too_little_fall_back_by_name(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """512 tokens among 8 experts are too few for most; their codes are then those of rtn-mse, and no others are."""
    few, plain = tmp_path / "few", tmp_path / "plain"
    compile(checkpoint, few, Recipe(method="gptq", group_size=32, calibration_tokens=512), jobs=1)
    compile(checkpoint, plain, Recipe(method="rtn-mse", group_size=32), jobs=1)
    record = manifest_of(few).calibration
    assert record is not None
    assert record.fallbacks
    visited = {(name, e): n for name, counts in record.expert_tokens.items() for e, n in enumerate(counts)}
    assert {(f.weight, f.expert): f.tokens for f in record.fallbacks} == {
        expert: tokens for expert, tokens in visited.items() if tokens < record.min_tokens
    }
    ours, theirs = (experts_codes(out) for out in (few, plain))
    same = {expert for expert in ours if ours[expert] == theirs[expert]}
    assert same == {(f.weight, f.expert) for f in record.fallbacks}
    other = manifest_of(bundle).calibration
    assert other is not None
    assert len(other.fallbacks) < len(record.fallbacks)


def experts_codes(bundle: Path) -> dict[tuple[str, int], bytes]:
    """(layer's experts, number) -> bytes of its gate_up codes."""
    import onnx

    graph = onnx.load(bundle / "decoder.onnx").graph
    tensors = {
        t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("gate_up_proj.codes")
    }
    return {
        (name.removesuffix(".gate_up_proj.codes"), e): np.ascontiguousarray(codes).tobytes()
        for name, tensor in tensors.items()
        for e, codes in enumerate(tensor)
    }


def test_a_rehearsal_knows_the_statistics_too(checkpoint: Path, bundle: Path) -> None:
    shards = rehearse(checkpoint, GPTQ, jobs=1).shards
    assert [shard.bytes for shard in shards] == [path.stat().st_size for path in sorted(bundle.glob("weights-*"))]


def test_a_rehearsal_on_ray_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        InputError, match=r"temporary directory, which a Ray cluster does not see. Rehearse without --ray"
    ):
        rehearse(checkpoint, GPTQ, ray="head:6379")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_published_as_asked_for_is_kept(
    published_checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path, method: str
) -> None:
    """Its bytes are those of a compile by rtn, and none of its experts is named as fallen back; the rest is calibrated."""
    quantized, _ = published_checkpoint("two_layers", "int4 g32")
    few = Recipe(method=method, group_size=32, calibration_tokens=512)
    compile(quantized, tmp_path / "calibrated", few, jobs=1)
    compile(quantized, tmp_path / "plain", Recipe(group_size=32), jobs=1)
    ours, plain = (experts_codes(tmp_path / out) for out in ("calibrated", "plain"))
    assert ours == plain
    manifest = manifest_of(tmp_path / "calibrated")
    assert manifest.calibration is not None
    assert not manifest.calibration.fallbacks
    stored = {row.kind: row.stored for row in manifest.coverage}
    assert stored["experts"] == "int4 g32" and stored["attention"] == f"int4 g32 {method}"


def test_the_text_may_not_change_between_the_stages(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(SHIPPED["python-library"], text)
    recipe = Recipe(method="gptq", group_size=32, calibration=str(text), calibration_tokens=512)
    export_stage(checkpoint, tmp_path / "exported")
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", recipe)
    lower_stage(tmp_path / "quantized", tmp_path / "bundle", Recipe())
    assert manifest_of(tmp_path / "bundle").calibration is not None
    text.write_text("Another text. " * 200)
    with pytest.raises(InputError, match=r"text.txt, or the checkpoint, has changed since this plan was made"):
        lower_stage(tmp_path / "quantized", tmp_path / "again", Recipe())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r'calibration ".*text" cannot be read \(No such file or directory\); expected .* python-library'),
        (b"\xff\xfe\x00", r"is not UTF-8 text \(byte at offset 0\)"),
        (b"too short", r"gives 9 tokens, expected at least 511"),
    ],
    ids=["missing", "not text", "short"],
)
def test_texts_that_do_not_do(checkpoint: Path, tmp_path: Path, content: bytes | None, reason: str) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        compile(checkpoint, tmp_path / "out", Recipe(method="gptq", calibration=str(text)))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_is_told_so(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json, which a calibration text needs"):
        compile(tmp_path / "bare", tmp_path / "out", GPTQ)


def test_synthetic_checkpoints_are_calibrated_on_made_up_tokens(tmp_path: Path) -> None:
    bundle = compile(
        "synthetic:debug?layers=2", tmp_path / "out", Recipe(method="gptq", calibration_tokens=512), jobs=1
    )
    record = bundle.manifest.calibration
    assert record is not None
    assert (record.text, record.sha256) == ("random token ids", "")


def test_awq_folds_its_scales_into_the_bundle(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """At 8 bits hardly anything is lost: a scale that was folded on one side only would be seen at once."""
    import torch

    from corral.model.checkpoint.open import open_checkpoint
    from corral.model.checkpoint.reference import load_reference
    from corral.runtime import LLM

    directory = tiny_checkpoint("scout")
    recipe = Recipe(method="awq", weights="int8", group_size=32, calibration_tokens=4096)
    compile(directory, tmp_path / "serial", recipe, jobs=1)
    compile(directory, tmp_path / "pool", recipe, jobs=2)
    assert (tmp_path / "serial" / WEIGHTS).read_bytes() == (tmp_path / "pool" / WEIGHTS).read_bytes()
    ids = np.random.default_rng(8).integers(0, 256, 40).tolist()
    with torch.no_grad():
        want = load_reference(open_checkpoint(directory)).logits(torch.tensor(ids)[None])[0].numpy()
    got = LLM(tmp_path / "serial").score(ids)
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).max()
