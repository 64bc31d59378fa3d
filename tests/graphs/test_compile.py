"""Compile: same bytes twice, complete coverage, and for every bad input one clear error with nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.graphs import compile
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.spec.bundle import open_bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.recipe import Recipe

Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
INT4 = Recipe(target="cpu", weights="int4", group_size=32)


def digests(directory: Path) -> dict[str, str]:
    return {record.path: record.sha256 for record in open_bundle(directory).manifest.files}


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_compiling_twice_gives_the_same_bytes(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path, target: str
) -> None:
    first = tiny_bundle("scout", target, "int4")
    compile(tiny_checkpoint("scout"), tmp_path / "again", open_bundle(first).manifest.recipe)
    assert digests(first) == digests(tmp_path / "again")
    assert (first / "manifest.json").read_bytes() == (tmp_path / "again" / "manifest.json").read_bytes()


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2"])
def test_every_graph_passes_the_checker(tiny_bundle: Bundle, form: str, weights: str, target: str) -> None:
    path = tiny_bundle(form, target, weights) / "decoder.onnx"
    onnx.checker.check_model(path)
    domains = {node.domain for node in onnx.load(path, load_external_data=False).graph.node}
    assert domains == ({"", "com.microsoft"} if target == "cpu" else {"", "corral"})


def test_no_machine_path_is_in_a_finished_bundle(tiny_checkpoint: Checkpoint, tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle("scout", "cpu", "int4")
    here, source = str(Path(__file__).parents[2]).encode(), str(tiny_checkpoint("scout")).encode()
    for name in ("decoder.onnx", "plan.json", "manifest.json"):
        data = (bundle / name).read_bytes()
        assert here not in data
        assert source not in data


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize(("weights", "bits"), [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("form", ["scout", "maverick", "guard"])
def test_quantized_coverage_is_complete_by_manifest_and_by_file_size(
    tiny_bundle: Bundle, form: str, weights: str, bits: int, target: str
) -> None:
    bundle = tiny_bundle(form, target, weights)
    manifest = open_bundle(bundle).manifest
    rows = {row.kind: row for row in manifest.coverage}
    assert len(rows) == len(manifest.coverage), "a kind of weight is stored in two ways"
    in_float = {kind for kind, row in rows.items() if not row.stored.startswith(weights)}
    assert in_float <= {"router", "norm", "embedding"}
    per_weight = (bits + 32 / 32) / 8  # codes and one float32 scale per 32
    quantized = sum(row.parameters for kind, row in rows.items() if kind not in in_float)
    kept = sum(row.bytes for kind, row in rows.items() if kind in in_float)
    assert quantized > 100_000
    initializers = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.initializer
    planned = json.loads((bundle / "plan.json").read_text())
    shards = sum(path.stat().st_size for path in bundle.glob("weights-*.bin"))
    assert shards <= quantized * per_weight + kept + 4096 * len(planned)
    floats = [t for t in initializers if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    names = {t.name for t in floats if not t.name.endswith(".scales")}
    assert all("router" in name for name in names), names


def test_the_stages_one_by_one_make_the_same_bundle(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    export_stage(tiny_checkpoint("scout"), tmp_path / "exported")
    assert not list((tmp_path / "exported").glob("weights-*"))
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", INT4)
    lower_stage(tmp_path / "quantized", tmp_path / "lowered", INT4)
    assert digests(tmp_path / "lowered") == digests(tiny_bundle("scout", "cpu", "int4"))


def test_stages_out_of_order_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_stage(tiny_checkpoint("guard"), tmp_path / "exported")
    with pytest.raises(InputError, match=r'at stage "exported", expected "quantized".*corral quantize'):
        lower_stage(tmp_path / "exported", tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(tiny_checkpoint("scout"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refuses(checkpoint: Path, match: str) -> None:
    """Compiling raises InputError of one paragraph, and leaves no file and no directory."""
    out = checkpoint.parent / "out"
    with pytest.raises(InputError, match=match) as caught:
        compile(checkpoint, out, INT4)
    assert "\n\n" not in str(caught.value)
    assert not out.exists()


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.feed_forward.experts.down_proj"


def test_truncated_safetensors(broken: Path) -> None:
    path = broken / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    refuses(broken, "model.safetensors")


def test_header_that_claims_2_to_the_60_bytes(broken: Path) -> None:
    with (broken / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 60))
    refuses(broken, "model.safetensors")


def test_missing_shard(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("multimodal"), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model-00002-of-00002.safetensors").unlink()
    refuses(tmp_path / "checkpoint", "model-00002-of-00002.safetensors")


def test_wrong_shape_missing_and_unknown_tensors_are_named_in_one_error(broken: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT][:, :, :-1].contiguous()
        tensors["model.surprise"] = torch.zeros(1)
        del tensors["model.norm.weight"]

    rewrite(broken, change)
    refuses(broken, r"(?s)model\.norm\.weight.*model\.surprise.*" + EXPERT.replace(".", r"\."))


def test_nan_weight_is_named_and_nothing_is_left(broken: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][3, 5, 7] = torch.nan

    rewrite(broken, change)
    refuses(broken, r"down_proj holds nan \(expert 3")


def test_unsupported_architecture(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    refuses(broken, 'model_type "qwen3"; corral compiles "llama4" and "llama4_text"')


def test_group_size_that_does_not_divide(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"group size 128 does not divide the 64 inputs of .*--group-size 32 or 64"):
        compile(tiny_checkpoint("scout"), tmp_path / "out", Recipe(weights="int4", group_size=128))
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_holds_something_else_is_left_alone(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds something that is no bundle"):
        compile(tiny_checkpoint("guard"), tmp_path, INT4, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_bundle_is_replaced_only_when_asked(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile(tiny_checkpoint("guard"), out, INT4)
    before = digests(out)
    with pytest.raises(InputError, match="holds a bundle already"):
        compile(tiny_checkpoint("scout"), out, INT4)
    assert digests(out) == before
    compile(tiny_checkpoint("scout"), out, INT4, fresh=True)
    assert digests(out) != before


def test_a_disk_too_small_is_said_before_anything_is_written(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentProblem, match="GB free"):
        compile(tiny_checkpoint("guard"), tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


def test_multimodal_names_and_shards_give_the_text_decoder(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """The published files' form: nested config, bf16 in two shards, a vision tower beside, old rope spelling."""
    compile(tiny_checkpoint("multimodal"), tmp_path / "out", Recipe(target="cpu", weights="fp32"))
    ours = np.fromfile(tmp_path / "out" / "weights-00000.bin", np.uint8)
    assert ours.size > 0
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.embedding is not None
    assert manifest.embedding.dtype == "bfloat16"
    assert manifest.model.layers == open_bundle(tiny_bundle("scout", "cpu", "fp32")).manifest.model.layers
