"""Candidates that are broken on purpose: what is broken is named, and healthy ones are not accused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from corral.cli.main import main
from corral.spec.errors import InputError
from corral.spec.manifest import FileRecord, Manifest, read_manifest
from corral.spec.weight_plan import ITEM_BITS, WeightPlan
from corral.validate import compare
from corral.validate.layers import Fidelity
from corral.validate.report import CandidateResult

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]
IDS = np.random.default_rng(5).integers(0, 256, 600).tolist()  # windows longer than three chunks of 16


def judged(reference: Path, candidate: Path) -> CandidateResult:
    report = compare(
        reference, [candidate], token_ids=IDS, window=50, repeats=1, prompt_tokens=4, decode_tokens=2, inside=True
    )
    (result,) = report.candidates
    json.dumps(report.to_json(), allow_nan=False)
    return result


class Broken:
    """A copy of a bundle whose stored numbers are changed; its manifest is made true again."""

    def __init__(self, bundle: Path, out: Path) -> None:
        self.directory = Path(shutil.copytree(bundle, out))
        plan = WeightPlan.from_json(json.loads((out / "plan.json").read_text()))
        self.entries, self.placements = plan.entries, plan.placements(starts={"embedding"})

    def change(self, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Replace a stored tensor of float32 or of bytes by `change` of it."""
        (entry,) = (entry for entry in self.entries.values() if name in entry.name)
        place = self.placements[entry.name]
        dtype = np.float32 if entry.dtype == "float32" else np.uint8
        shape = entry.shape if ITEM_BITS[entry.dtype] >= 8 else (-1,)
        with (self.directory / f"weights-{place.shard:05}.bin").open("r+b") as file:
            file.seek(place.offset)
            values = np.frombuffer(file.read(place.nbytes), dtype).reshape(shape)
            file.seek(place.offset)
            file.write(np.ascontiguousarray(change(values), dtype).tobytes())
        self.rewrite(lambda manifest: manifest)

    def rewrite(self, change: Callable[[Manifest], Manifest]) -> None:
        manifest = read_manifest(self.directory)
        contents = {record.path: (self.directory / record.path).read_bytes() for record in manifest.files}
        files = tuple(
            FileRecord(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in contents.items()
        )
        (self.directory / "manifest.json").write_text(change(dataclasses.replace(manifest, files=files)).dumps())


@pytest.fixture
def broken(tiny_bundle: TinyBundle, tmp_path: Path) -> Broken:
    return Broken(tiny_bundle("scout", "cpu", "int4"), tmp_path / "broken")


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("form", ["scout", "maverick", "topk2"])
def test_healthy_int4_is_not_accused(
    tiny_checkpoint: TinyCheckpoint, tiny_bundle: TinyBundle, form: str, target: str
) -> None:
    result = judged(tiny_checkpoint(form), tiny_bundle(form, target, "int4"))
    assert result.verdict is None, str(result.verdict)
    assert result.insides is not None
    for layer in result.insides.layers:
        assert 5 < layer.after.signal_to_noise < 60
        assert layer.attention.gain == pytest.approx(1, abs=0.2)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("form", ["scout", "guard"])
def test_the_sums_of_a_layer_are_found_where_a_norm_is_part_of_them(
    tiny_checkpoint: TinyCheckpoint, tiny_bundle: Callable[..., Path], form: str
) -> None:
    """Of corral's own kernels: what is looked at is what the stock ones compute there, but for other roundings."""
    own, stock = (
        judged(tiny_checkpoint(form), tiny_bundle(form, "cpu", "int4", kernels)).insides
        for kernels in ("corral", "stock")
    )
    assert own is not None and stock is not None
    for mine, theirs in zip(own.layers, stock.layers, strict=True):
        assert mine.attention.signal_to_noise == pytest.approx(theirs.attention.signal_to_noise, abs=3)
        assert mine.after.signal_to_noise == pytest.approx(theirs.after.signal_to_noise, abs=3)
        assert mine.attention.gain == pytest.approx(1, abs=0.2)
        assert mine.feed_forward.signal_to_noise == pytest.approx(theirs.feed_forward.signal_to_noise, abs=3)
        for expert, same in zip(mine.experts, theirs.experts, strict=True):
            if expert.both > 20 and same.both > 20:
                assert expert.answer.signal_to_noise == pytest.approx(same.answer.signal_to_noise, abs=5)


def test_floats_differ_by_rounding_only_and_every_expert_is_counted(
    tiny_checkpoint: TinyCheckpoint, tiny_bundle: TinyBundle
) -> None:
    """The insides of a bundle and of the PyTorch model, taken by different means, are the same numbers."""
    insides = judged(tiny_checkpoint("maverick"), tiny_bundle("maverick", "cpu", "fp32")).insides
    assert insides is not None
    assert insides.logits.signal_to_noise > 90
    for layer in insides.layers:
        parts = [layer.attention, layer.feed_forward, layer.after, *(e.answer for e in layer.experts if e.both)]
        assert min(part.signal_to_noise for part in parts) > 90
        if layer.router_agreement is not None:
            assert layer.router_agreement == 1.0
            assert sum(e.tokens for e in layer.experts) == insides.tokens
            assert layer.expert_coverage == sum(e.tokens > 0 for e in layer.experts) / 8


def test_a_bundle_can_be_the_reference(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("scout", "cpu", "int4")
    insides = judged(bundle, bundle).insides
    assert insides is not None
    assert {part.signal_to_noise for layer in insides.layers for part in (layer.attention, layer.after)} == {np.inf}


def test_the_command_names_what_is_broken_and_exits_1(
    tiny_checkpoint: TinyCheckpoint, broken: Broken, tmp_path: Path
) -> None:
    broken.change("layers.1.feed_forward.experts.down_proj.scales", lambda scales: 2 * scales)
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    command = ["validate", tiny_checkpoint("scout"), broken.directory, "--token-ids", tmp_path / "ids.json"]
    options = ["--window", "50", "--repeats", "1", "--inside", "--json"]
    result = CliRunner().invoke(main, [*map(str, command), *options])
    assert result.exit_code == 1, result.output
    [candidate] = json.loads(result.stdout)["candidates"]
    assert candidate["verdict"]["layer"] == 1
    assert f"{broken.directory.name} is broken in layer 1" in result.stderr


def test_an_expert_that_is_zeroed_is_named(tiny_checkpoint: TinyCheckpoint, broken: Broken) -> None:
    def zero(scales: NDArray[Any]) -> NDArray[Any]:
        scales = scales.copy()
        scales[5] = 0
        return scales

    broken.change("layers.2.feed_forward.experts.down_proj.scales", zero)
    verdict = judged(tiny_checkpoint("scout"), broken.directory).verdict
    assert verdict is not None
    assert (verdict.layer, verdict.part, verdict.experts) == (2, "experts", (5,))
    assert verdict.found.gain == 0
    assert str(verdict).startswith("layer 2, expert 5: 0.0 dB, 0.00 times")


def test_doubled_scales_are_found_where_they_are(tiny_checkpoint: TinyCheckpoint, broken: Broken) -> None:
    names = [name for name in broken.entries if name.startswith("layers.1.") and name.endswith("scales")]
    assert len(names) == 6  # q, k and v together; o; gate and up of the shared expert; its down; the experts' two
    for name in names:
        broken.change(name, lambda scales: 2 * scales)
    verdict = judged(tiny_checkpoint("scout"), broken.directory).verdict
    assert verdict is not None
    assert (verdict.layer, verdict.part, verdict.position) == (1, "attention", None)
    assert verdict.found.gain == pytest.approx(4, rel=0.1)  # values and the projection out of attention


@pytest.mark.parametrize(
    ("entry", "part"),
    [("shared_expert.down_proj", "feed-forward"), ("experts.down_proj", "experts"), ("lm_head", "head")],
)
def test_doubled_scales_of_one_matrix(tiny_checkpoint: TinyCheckpoint, broken: Broken, entry: str, part: str) -> None:
    (name,) = (
        n for n in broken.entries if f"{entry}" in n and n.endswith("scales") and ("layers.0" in n or part == "head")
    )
    broken.change(name, lambda scales: 2 * scales)
    verdict = judged(tiny_checkpoint("scout"), broken.directory).verdict
    assert verdict is not None
    assert (verdict.layer, verdict.part, verdict.experts) == (None if part == "head" else 0, part, ())
    assert verdict.found.gain == pytest.approx(2, rel=0.1)  # int4's noise leaves a little less


@pytest.mark.parametrize("chunk", [15, 17])
def test_a_chunk_boundary_off_by_one_is_found(tiny_checkpoint: TinyCheckpoint, broken: Broken, chunk: int) -> None:
    def move(manifest: Manifest) -> Manifest:
        moved = (dataclasses.replace(kv, chunk=chunk) if kv.kv_class == "chunked" else kv for kv in manifest.kv)
        return dataclasses.replace(manifest, kv=tuple(moved))

    broken.rewrite(move)
    verdict = judged(tiny_checkpoint("scout"), broken.directory).verdict
    assert verdict is not None
    assert (verdict.layer, verdict.part, verdict.position) == (0, "attention", min(chunk, 16))
    assert verdict.chunk_boundary


def test_permuted_router_rows_are_found(tiny_checkpoint: TinyCheckpoint, broken: Broken) -> None:
    (name,) = (n for n in broken.entries if n.startswith("layers.1.feed_forward.router"))
    experts_axis = broken.entries[name].shape.index(8)
    broken.change(name, lambda router: np.roll(router, 1, axis=experts_axis))
    result = judged(tiny_checkpoint("scout"), broken.directory)
    assert result.verdict is not None and result.insides is not None
    assert (result.verdict.layer, result.verdict.part) == (1, "router")
    before, after = (result.insides.layers[i].router_agreement for i in (0, 1))
    assert before is not None and after is not None and after < 0.3 < before


def test_a_graph_without_names_is_refused(broken: Broken) -> None:
    import onnx

    path = broken.directory / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    path.write_bytes(model.SerializeToString())
    broken.rewrite(lambda manifest: manifest)
    with pytest.raises(InputError, match=r"decoder\.onnx does not name what layer 0 computes"):
        judged(broken.directory, broken.directory)


def test_noise_is_a_share_of_the_signal() -> None:
    assert Fidelity(signal_to_noise=10.0, gain=1.0).noise == pytest.approx(0.1)
    assert Fidelity(signal_to_noise=np.inf, gain=1.0).noise == 0
