"""Weights that a checkpoint stores quantized: kept bit for bit, stored exactly, or quantized again where that is asked for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import corral.exporter.capture
from corral.graphs import compile
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.spec.bundle import open_bundle
from corral.spec.errors import InputError
from corral.spec.manifest import read_manifest
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Entry, WeightPlan

Published = Callable[..., tuple[Path, Path]]
Bundle = Callable[[str, str], Path]
PREFIX = "language_model.model.layers.1.feed_forward"


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> Iterator[None]:
    """Every compile here is of models of one shape, whose capture takes longer than all the rest."""
    capture = cache(corral.exporter.capture.capture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corral.exporter.export.capture", lambda config: capture(config).clone())
        yield


@pytest.fixture(scope="module")
def kept(published_checkpoint: Published, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`kept("cpu", "two_layers")` -> its int4 checkpoint compiled to what it is stored in, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(target: str, form: str) -> Path:
        if (target, form) not in made:
            out = tmp_path_factory.mktemp("kept") / "out"
            compile(published_checkpoint(form, "int4 g32")[0], out, int4(target))
            made[target, form] = out
        return made[target, form]

    return make


def int4(target: str = "cpu") -> Recipe:
    return Recipe(target=target, weights="int4", group_size=32)


def digests(directory: Path) -> dict[str, str]:
    return {record.path: record.sha256 for record in open_bundle(directory).manifest.files}


def plan_of(bundle: Path) -> WeightPlan:
    return WeightPlan.from_json(json.loads((bundle / "plan.json").read_text()))


def stored(bundle: Path, weight: str, part: str) -> tuple[Entry, bytes]:
    """The entry that stores "codes" or "scales" of a weight (and of those merged with it), and its bytes."""
    plan = plan_of(bundle)
    (entry,) = (e for e in plan if weight in e.weight.split("+") and e.name.endswith(part))
    place = plan.placements()[entry.name]
    with (bundle / f"weights-{place.shard:05}.bin").open("rb") as file:
        file.seek(place.offset)
        return entry, file.read(place.nbytes)


def test_cpu_has_the_published_words_and_scales_bit_for_bit(published_checkpoint: Published, kept: Bundle) -> None:
    """ONNX Runtime's kernels take rows of packed nibbles, which is how the words lie in the file: the bytes are equal."""
    tensors = load_file(published_checkpoint("two_layers", "int4 g32")[0] / "model.safetensors")
    down = [f"{PREFIX}.experts.{e}.down_proj" for e in range(8)]
    merged = [f"{PREFIX}.shared_expert.{matrix}_proj" for matrix in ("gate", "up")]
    for weight, modules in {
        "layers.1.feed_forward.experts.down_proj": down,
        "layers.1.feed_forward.shared_expert.up_proj.weight": merged,
    }.items():
        _, codes = stored(kept("cpu", "two_layers"), weight, "codes")
        _, scales = stored(kept("cpu", "two_layers"), weight, "scales")
        assert codes == b"".join(tensors[f"{module}.weight_packed"].numpy().tobytes() for module in modules)
        assert scales == b"".join(tensors[f"{module}.weight_scale"].float().numpy().tobytes() for module in modules)


def test_cpu_has_gate_and_up_row_by_row(published_checkpoint: Published, kept: Bundle) -> None:
    tensors = load_file(published_checkpoint("two_layers", "int4 g32")[0] / "model.safetensors")
    _, codes = stored(kept("cpu", "two_layers"), "layers.1.feed_forward.experts.gate_up_proj", "codes")
    rows = np.frombuffer(codes, np.uint8).reshape(8, 128, 32)
    for e in range(8):
        for first, matrix in enumerate(("gate", "up")):
            packed = tensors[f"{PREFIX}.experts.{e}.{matrix}_proj.weight_packed"].numpy()
            assert np.array_equal(rows[e, first::2], packed.view(np.uint8))


def test_portable_dequantizes_to_the_published_numbers(published_checkpoint: Published, kept: Bundle) -> None:
    """ONNX's own reader of INT4: codes [inputs, outputs] times their scales are the library's values, exactly."""
    plain = load_file(published_checkpoint("two_layers", "int4 g32")[1] / "model.safetensors")
    bundle = kept("portable", "two_layers")
    graph = onnx.load(bundle / "decoder.onnx").graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    published = [entry for entry in plan_of(bundle) if entry.published and entry.name.endswith(".codes")]
    assert len(published) == 2 + 3 + 3  # fused experts and a shared one in one layer, a dense MLP in the other
    for entry in published:
        codes = onnx.numpy_helper.to_array(initializers[entry.name]).astype(np.float32)
        scales = onnx.numpy_helper.to_array(initializers[entry.name.replace(".codes", ".scales")])
        values = codes * np.repeat(scales, 32, axis=-2)
        want = plain[f"language_model.model.{entry.weight}"]
        assert np.array_equal(values, (want.T if want.ndim == 2 else want).numpy()), entry.name


def test_only_what_is_published_quantized_is_kept(kept: Bundle) -> None:
    for target in ("cpu", "portable"):
        rows = {row.kind: row for row in open_bundle(kept(target, "two_layers")).manifest.coverage}
        assert {kind for kind, row in rows.items() if row.published} == {"experts", "shared expert", "dense"}
        assert all(row.stored == row.published == "int4 g32" for row in rows.values() if row.published)
        assert rows["attention"].stored == rows["head"].stored == "int4 g32"
        for entry in plan_of(kept(target, "two_layers")):
            steps = [step.name for step in entry.steps]
            assert ("as_published" in steps) == bool(entry.published), entry.name
            assert not ("rtn" in steps and "as_published" in steps)


@pytest.mark.parametrize("published", ["fp8 per output", "int4 g32", "int4 g32 asymmetric"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_fp32_stores_the_exact_values(
    published_checkpoint: Published, tmp_path: Path, published: str, target: str
) -> None:
    """Equal, byte for byte, to a compile of the same numbers as a plain float32 checkpoint; no word of consent needed."""
    quantized, plain = published_checkpoint("two_layers", published)
    recipe = Recipe(target=target, weights="fp32")
    compile(quantized, tmp_path / "quantized", recipe)
    compile(plain, tmp_path / "plain", recipe)
    shards = [{k: v for k, v in digests(tmp_path / k).items() if "weights" in k} for k in ("quantized", "plain")]
    assert shards[0] == shards[1]
    assert digests(tmp_path / "quantized")["decoder.onnx"] == digests(tmp_path / "plain")["decoder.onnx"]
    rows = {row.kind: row for row in read_manifest(tmp_path / "quantized").coverage}
    assert (rows["experts"].stored, rows["experts"].published) == ("float32", published)


@pytest.mark.parametrize(
    ("published", "weights", "group_size", "remedies"),
    [
        ("int4 g32", "int8", 32, "--weights int4 --group-size 32 to keep its codes as they are, --weights fp32"),
        ("int4 g32", "int4", 64, "--weights int4 --group-size 32 to keep its codes as they are, --weights fp32"),
        (
            "int4 g32 asymmetric",
            "int4",
            32,
            "--weights int4 --group-size 32 --asymmetric to keep its codes as they are",
        ),
        ("int4 per output", "int4", 64, "Use --weights fp32"),
        ("fp8 per output", "int4", 32, "Use --weights fp32"),
    ],
)
def test_nothing_is_quantized_again_unasked(
    published_checkpoint: Published, tmp_path: Path, published: str, weights: str, group_size: int, remedies: str
) -> None:
    quantized, plain = published_checkpoint("two_layers", published)
    recipe = Recipe(target="cpu", weights=weights, group_size=group_size)
    said = rf"quantized already \({published}\), and {weights} g{group_size} was asked for.*{remedies}"
    with pytest.raises(InputError, match=said):
        compile(quantized, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()

    compile(quantized, tmp_path / "again", dataclasses.replace(recipe, requantize=True))
    compile(plain, tmp_path / "plain", recipe)
    shards = [{k: v for k, v in digests(tmp_path / k).items() if "weights" in k} for k in ("again", "plain")]
    assert shards[0] == shards[1], "requantizing is rounding the exact values"
    rows = {row.kind: row for row in read_manifest(tmp_path / "again").coverage}
    assert (rows["experts"].stored, rows["experts"].published) == (f"{weights} g{group_size}", published)
    assert read_manifest(tmp_path / "again").recipe.requantize


def test_consent_does_not_touch_what_can_be_kept(published_checkpoint: Published, kept: Bundle, tmp_path: Path) -> None:
    quantized, _ = published_checkpoint("two_layers", "int4 g32")
    compile(quantized, tmp_path / "out", Recipe(target="cpu", weights="int4", group_size=32, requantize=True))
    assert digests(tmp_path / "out")["weights-00000.bin"] == digests(kept("cpu", "two_layers"))["weights-00000.bin"]


def test_processes_and_stages_give_the_same_bytes(
    published_checkpoint: Published, kept: Bundle, tmp_path: Path
) -> None:
    quantized, _ = published_checkpoint("two_layers", "int4 g32")
    compile(quantized, tmp_path / "two", int4(), jobs=2)
    assert digests(tmp_path / "two") == digests(kept("cpu", "two_layers"))
    export_stage(quantized, tmp_path / "exported")
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", int4())
    lower_stage(tmp_path / "quantized", tmp_path / "lowered", int4())
    assert digests(tmp_path / "lowered") == digests(kept("cpu", "two_layers"))


def test_projections_that_are_stored_differently_are_not_merged(
    published_checkpoint: Published, tmp_path: Path
) -> None:
    """Only q is published in int4; k and v are rounded here. One product of all three would read one as the other."""
    quantized, _ = published_checkpoint("two_layers", "int4 g32", r"self_attn\.q_proj")
    compile(quantized, tmp_path / "out", int4())
    weights = {
        entry.weight for entry in plan_of(tmp_path / "out") if re.fullmatch(r".*0\.self_attn\.[qkv].*", entry.weight)
    }
    layer = "layers.0.self_attn"
    assert weights == {f"{layer}.q_proj.weight", f"{layer}.k_proj.weight+{layer}.v_proj.weight"}
    tensors = load_file(quantized / "model.safetensors")
    _, codes = stored(tmp_path / "out", f"{layer}.q_proj.weight", "codes")
    assert codes == tensors[f"language_model.model.{layer}.q_proj.weight_packed"].numpy().tobytes()


def test_a_job_reads_codes_in_parts(published_checkpoint: Published, kept: Bundle) -> None:
    """A matrix too large for one job is cut, and its parts are those of the whole."""
    from corral.graphs.execute.job import plan_jobs, run_job
    from corral.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(published_checkpoint("two_layers", "int4 g32")[0])
    for target in ("cpu", "portable"):
        bundle = kept(target, "two_layers")
        plan = plan_of(bundle)
        name = next(e.name for e in plan if "layers.0.feed_forward.gate" in e.weight and e.name.endswith("codes"))
        one = WeightPlan({name: plan.entries[name]})
        jobs = plan_jobs(one, one.placements(), limit=32 * 64)
        assert len(jobs) > 1
        data = bytearray(one.entries[name].nbytes)
        for job in jobs:
            for output, part in run_job(job, checkpoint.read_piece):
                data[output.offset : output.offset + output.nbytes] = part
        _, whole = stored(bundle, one.entries[name].weight.split("+")[0], "codes")
        assert bytes(data) == whole


@pytest.mark.parametrize("value", [torch.nan, -1.0])
def test_a_damaged_scale_stops_the_compile_by_name(
    published_checkpoint: Published, tmp_path: Path, value: float
) -> None:
    import shutil

    from safetensors.torch import save_file

    copy = Path(shutil.copytree(published_checkpoint("two_layers", "int4 g32")[0], tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{PREFIX}.experts.3.up_proj.weight_scale"][5, 1] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.3\.up_proj\.weight_scale holds (nan|-1\.0) \(row 5, column 1\)"):
        compile(copy, tmp_path / "out", int4())
    assert not (tmp_path / "out").exists()
