"""Engines of the demo model and of tiny ones, built for real by TensorRT for RTX, without a GPU. None is executed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest

from corral.graphs import compile
from corral.graphs.engine import build
from corral.graphs.engine.build import EngineSettings, build_engine
from corral.graphs.engine.engines import build_engines
from corral.graphs.engine.profiles import Profile, profiles_for
from corral.graphs.engine.schedule import Kernel, Schedule
from corral.graphs.engine.tensorrt_module import check_installed
from corral.spec.bundle import open_bundle
from corral.spec.errors import CheckFailed, EnvironmentProblem, InputError
from corral.spec.recipe import Recipe
from corral.spec.tensorrt_flavors import FLAVORS

pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[3] / "demo" / "demo-scout"
TinyBundle = Callable[[str, str, str], Path]
Lowered = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The demo model with engines for some GPUs; made once. Do not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(weights: str, gpu: str) -> Path:
        """`weights` "fp8 int4": all but the experts, and those."""
        if (weights, gpu) not in made:
            made[weights, gpu] = tmp_path_factory.mktemp("built") / "demo"
            shutil.copytree(lowered(weights), made[weights, gpu])
            build_engines(made[weights, gpu], gpu=gpu)
        return made[weights, gpu]

    return make


def sidecar(bundle: Path) -> dict[str, Any]:
    (engine,) = open_bundle(bundle).manifest.engines
    return json.loads((bundle / engine.sidecar).read_text())


ENGINES = [(weights, gpu) for weights in ("fp16", "int4") for gpu in ("8.6", "rtx4090", "12.0", "8.6,8.9,12.0")]
ENGINES += [("fp8", "rtx4090"), ("fp8", "12.0"), ("w4a8", "rtx4090"), ("w4a8", "12.0"), ("nvfp4", "12.0")]


@pytest.mark.parametrize(("weights", "gpu"), ENGINES)
def test_the_demo_builds_and_its_engine_is_as_large_as_its_weights_bits(
    built: Callable[[str, str], Path], weights: str, gpu: str
) -> None:
    bundle = built(weights, gpu)
    manifest, about = open_bundle(bundle).manifest, sidecar(bundle)
    assert manifest.stage == "ready"
    assert manifest.engines[0].capabilities == Recipe(target="tensorrt-rtx", gpu=gpu).capabilities
    shards = sum(path.stat().st_size for path in bundle.glob("weights-*.bin"))
    assert about["expected_weight_bytes"] < shards  # the embedding is gathered outside
    # Each weight once for both profiles; the rest are constants of the schedule, and what lies around any engine.
    assert abs(about["weight_bytes"] / about["expected_weight_bytes"] - 1) < 0.02
    assert [profile["name"] for profile in about["profiles"]] == ["decode", "prefill"]
    for profile in about["profiles"]:
        for schemes, kind, share in (
            ("int4 w4a8", "int4", 0.9),
            ("fp8", "fp8_e4m3", 0.95),
            ("nvfp4", "fp4_e2m1", 0.85),
        ):
            stored = profile["weights"].get(kind, 0)
            assert (stored > share * about["expected_weight_bytes"]) == (weights in schemes.split())
        fused = {layer for kernel in profile["kernels"] if "mha" in kernel["name"] for layer in kernel["layers"]}
        assert fused == {f"layers.{i}.self_attn.core.Attention" for i in range(4)}


def products(profile: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ONNX MatMul -> its kernel; routers, which stay in float32, apart."""
    return {
        layer.removesuffix(".MatMul"): kernel  # one kernel may multiply by several matrices of one input
        for kernel in profile["kernels"]
        for layer in kernel["layers"]
        if "MatMul" in layer and ".router." not in layer
    }


def layers_of_many_rows(profile: dict[str, Any]) -> int:
    """Of a prompt the last layer has one row: a kernel multiplies while it gathers, and writes no weights."""
    return 4 - (profile["name"] == "prefill")


def read(kernel: dict[str, Any]) -> list[str]:
    """The types of the matrices that a kernel reads."""
    return [operand["type"] for operand in kernel["reads"] if len(operand["shape"]) > 1]


def test_int4_is_multiplied_without_a_float_copy_but_for_the_chosen_experts(built: Callable[[str, str], Path]) -> None:
    """Dense matrices: dequantized within the matrix kernel. Experts: only what is gathered is written out, and listed."""
    for profile in sidecar(built("int4", "rtx4090"))["profiles"]:
        attention = {f"layers.{i}.self_attn{x}" for i in range(4) for x in ("", ".o_proj")}
        shared = {f"layers.{i}.feed_forward.shared_expert{x}" for i in range(4) for x in ("", ".down_proj")}
        assert {name for name, kernel in products(profile).items() if "int4" in read(kernel)} == (
            attention | shared | {"lm_head"}
        )
        writing = [k for k in profile["kernels"] if "int4" in read(k) and not any("MatMul" in n for n in k["layers"])]
        assert [kernel["name"] for kernel in writing] == [kernel["kernel"] for kernel in profile["unfused_weights"]]
        assert len(writing) == layers_of_many_rows(profile)
        tokens = {axis: most for axis, (_, _, most) in profile["axes"].items()}
        visits, experts = tokens["batch"] * tokens["tokens"], 16
        blocks = min(visits, experts) + (visits - min(visits, experts)) // max(1, visits // experts)
        for kernel in profile["unfused_weights"]:
            assert all(".experts." in layer for layer in kernel["layers"])
            # One expert's three matrices of 256 x 256 in 16 bits, for each block of rows and for no other expert.
            assert sum(tensor["known_bytes"] for tensor in kernel["writes"]) == 3 * 256 * 256 * 2
            # The builder reserves for 34 blocks where 30 suffice: it bounds each term of their number by itself.
            most = sum(tensor["most_bytes"] for tensor in kernel["writes"])
            assert blocks <= most / (3 * 256 * 256 * 2) < 1.2 * blocks


def test_fp8_is_multiplied_as_fp8_and_experts_are_gathered_as_such(built: Callable[[str, str], Path]) -> None:
    for profile in sidecar(built("fp8", "rtx4090"))["profiles"]:
        assert not profile["unfused_weights"]
        assert len(products(profile)) == 4 * (2 + 2 + 2) + 1  # attention, shared expert, experts; the head
        for name, kernel in products(profile).items():
            assert read(kernel)[:2] == ["fp8_e4m3"] * 2, name
            assert kernel["writes"][0]["type"] == "half"
        gathers = [k for k in profile["kernels"] if k["name"].endswith("GathGath")]
        written = [(tensor["shape"][-2:], tensor["type"]) for kernel in gathers for tensor in kernel["writes"]]
        assert written.count(([512, 256], "fp8_e4m3")) == written.count(([256, 256], "fp8_e4m3")) == 4


def test_w4a8_is_stored_as_int4_and_multiplied_as_fp8(built: Callable[[str, str], Path]) -> None:
    """Of experts those that are gathered become FP8, of dense matrices all of each, and are listed."""
    numbers = 4 * 16 * 3 * 256 * 256 + 4 * (3 + 3) * 256 * 256 + 256 * 2048
    for profile in sidecar(built("w4a8", "rtx4090"))["profiles"]:
        assert profile["weights"]["int4"] == numbers // 2
        assert len(products(profile)) == 4 * (2 + 2 + 2) + 1  # attention, shared expert, experts; the head
        for name, kernel in products(profile).items():
            assert read(kernel)[:2] == ["fp8_e4m3"] * 2, name
        written = [tensor for kernel in profile["unfused_weights"] for tensor in kernel["writes"]]
        assert {tensor["type"] for tensor in written} == {"fp8_e4m3"}
        experts = [tensor for tensor in written if len(tensor["shape"]) == 3]
        assert sum(tensor["known_bytes"] for tensor in experts) == 4 * 3 * 256 * 256


def test_nvfp4_stays_in_the_engine_and_what_is_written_as_float16_is_listed(built: Callable[[str, str], Path]) -> None:
    """Of experts what is gathered; of dense matrices, which no matrix kernel dequantizes on its way, all of each."""
    numbers = 4 * 16 * 3 * 256 * 256 + 4 * (3 + 3) * 256 * 256 + 256 * 2048
    for profile in sidecar(built("nvfp4", "12.0"))["profiles"]:
        assert profile["weights"]["fp4_e2m1"] == numbers // 2
        assert profile["weights"]["fp8_e4m3"] == numbers // 16
        written = Counter(
            tuple(size for size in tensor["shape"] if isinstance(size, int))
            for kernel in profile["unfused_weights"]
            for tensor in kernel["writes"]
        )
        # A layer has q, k and v, gate and up, o, down, and an expert's two; then there is the head. Of a prompt's last
        # layer, where but q, k and v all is computed for one row, these three alone are written.
        layers = layers_of_many_rows(profile)
        assert written == {(256, 512): layers * 3 + (4 - layers), (256, 256): layers * 3, (256, 2048): 1}


def test_experts_in_int4_beside_fp8_are_each_what_they_are(built: Callable[[str, str], Path]) -> None:
    about = sidecar(built("fp8 int4", "rtx4090"))
    # Each weight once for both profiles; the rest are constants of the schedule, and what lies around any engine.
    assert abs(about["weight_bytes"] / about["expected_weight_bytes"] - 1) < 0.02
    experts, all_else = 4 * 16 * 3 * 256 * 256, 4 * (3 + 3) * 256 * 256 + 256 * 2048
    for profile in about["profiles"]:
        assert abs(profile["weights"]["int4"] / (experts / 2) - 1) < 0.01
        assert abs(profile["weights"]["fp8_e4m3"] / all_else - 1) < 0.01
        assert len(profile["unfused_weights"]) == layers_of_many_rows(profile)
        for name, kernel in products(profile).items():
            assert read(kernel).count("fp8_e4m3") == (0 if ".experts" in name else 2), name


def test_fp8_on_gpus_without_it_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for gpu in ("a100", "8.6"):
        with pytest.raises(InputError, match=r"has no fp8 weights.*fp8 needs one of 8\.9, 12\.0\. Choose another"):
            compile(DEMO, tmp_path / "out", Recipe(target="tensorrt-rtx", weights="fp8", gpu=gpu))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_two_builds_in_small_floats_are_equal(built: Callable[[str, str], Path], tmp_path: Path, weights: str) -> None:
    shutil.copytree(built(weights, "12.0"), tmp_path / "copy")
    before = open_bundle(tmp_path / "copy").manifest.files
    assert sorted(build_engines(tmp_path / "copy").manifest.files, key=str) == sorted(before, key=str)


def test_two_builds_are_equal_and_a_second_gpu_is_added_beside_the_first(
    built: Callable[[str, str], Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "copy"
    shutil.copytree(built("int4", "rtx4090"), bundle)
    before = {record.path: record.sha256 for record in open_bundle(bundle).manifest.files}
    build_engines(bundle, gpu="8.9", fresh=True)
    assert {record.path: record.sha256 for record in open_bundle(bundle).manifest.files} == before
    manifest = build_engines(bundle, gpu="rtx5090").manifest
    assert [engine.capabilities for engine in manifest.engines] == [("8.9",), ("12.0",)]
    assert manifest.recipe.gpu == "8.9,12.0"
    assert before.items() <= {record.path: record.sha256 for record in open_bundle(bundle).manifest.files}.items()


@pytest.mark.parametrize("form", ["maverick", "guard", "topk2"])
def test_every_form_builds(tiny_bundle: TinyBundle, tmp_path: Path, form: str) -> None:
    shutil.copytree(tiny_bundle(form, "tensorrt-rtx", "int4"), tmp_path / "bundle")
    assert build_engines(tmp_path / "bundle", gpu="8.9").manifest.engines


def test_a_quantized_weight_that_became_float_is_refused_and_the_engine_not_kept(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float16 graph that claims to be int4 stands for a builder that dequantized on its own."""
    bundle = tmp_path / "copy"
    shutil.copytree(lowered("fp16"), bundle)
    facts = build._read_graph(bundle / "decoder.onnx")
    claimed = Counter({"INT4": facts.stored["FLOAT16"] // 4, "FLOAT": facts.stored["FLOAT"]})
    monkeypatch.setattr(build, "_read_graph", lambda _: dataclasses.replace(facts, stored=claimed))
    files = sorted(bundle.iterdir())
    with pytest.raises(CheckFailed, match=r"holds \d+\.\d MB of weights, expected \d+\.\d MB within 15%"):
        build_engines(bundle, gpu="8.9")
    assert sorted(bundle.iterdir()) == files
    assert open_bundle(bundle).manifest.stage == "lowered"


def test_a_fallback_shows_by_type_even_where_the_size_would_pass() -> None:
    kernels = (Kernel("k", "function", (), (), ()),)
    good = Schedule(kernels, {"int4": 100, "half": 10}, 0)
    bad = Schedule(kernels, {"int4": 20, "half": 90}, 0)
    stored = Counter({"INT4": 100, "FLOAT16": 10})
    build._check_weights(Path("a.engine"), [good, good], stored, 112, 110, 2)
    with pytest.raises(CheckFailed, match="of int4 weights"):
        build._check_weights(Path("a.engine"), [good, bad], stored, 112, 110, 2)


def test_what_the_builder_refuses_is_said_in_its_words_and_leaves_nothing(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 24]> g (float[batch, 4] x) => (int64[2, n] y) { y = NonZero(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    profile = Profile(name="any", axes={"batch": (1, 2, 4)})
    settings = EngineSettings(module="tensorrt_rtx", capabilities=("8.9",), profiles=(profile,))
    with pytest.raises(CheckFailed, match=r"tensorrt_rtx 1\.7\S* builds no engine of .*g\.onnx"):
        build_engine(tmp_path / "g.onnx", "g.engine", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_too_little_memory_is_said_before_the_build(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "usable_memory", lambda: 1 << 30)
    with pytest.raises(EnvironmentProblem, match=r"takes up to 1\.\d GB of memory, and 1\.1 GB are free"):
        build_engines(lowered("fp16"), gpu="8.9")


@pytest.mark.parametrize(
    ("found", "says"),
    [(None, "is not installed"), ("1.6.0.1", r"is 1\.6\.0\.1; this corral was written against 1\.7")],
)
def test_a_missing_or_other_package_ends_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, found: str | None, says: str
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EnvironmentProblem, match=says) as caught:
        check_installed("tensorrt_rtx")
    assert f'pip install "tensorrt-rtx-cu13=={FLAVORS["tensorrt_rtx"].version}"' in str(caught.value)


def test_the_version_in_the_table_is_the_one_that_is_pinned_and_tested() -> None:
    flavor = FLAVORS["tensorrt_rtx"]
    assert metadata.version(flavor.distribution) == flavor.version
    assert [name for name, other in FLAVORS.items() if other.executed] == ["tensorrt_rtx"]


def test_tensorrt_proper_without_plugins_is_lowered_alike_and_its_build_asks_for_its_package(
    lowered: Lowered, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentProblem, match=r'pip install "tensorrt=='):
        compile(DEMO, tmp_path / "out", Recipe(target="tensorrt", weights="fp16", gpu="h100"))
    assert not (tmp_path / "out").exists()
    compile(DEMO, tmp_path / "out", Recipe(target="tensorrt", weights="fp16", expert_tiles=1))
    assert (tmp_path / "out/decoder.onnx").read_bytes() == (lowered("fp16") / "decoder.onnx").read_bytes()


def test_bundles_that_cannot_have_an_engine_are_refused(
    tiny_bundle: TinyBundle, lowered: Lowered, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"for target cpu, which has no engines.*--target tensorrt-rtx or tensorrt"):
        build_engines(tiny_bundle("scout", "cpu", "int4"), gpu="8.9")
    with pytest.raises(InputError, match=r"does not say which GPU to build for\. Add --gpu"):
        build_engines(lowered("fp16"))
    with pytest.raises(InputError, match=r"builds no engines for compute capability 9\.0.*Use --target tensorrt"):
        build_engines(lowered("fp16"), gpu="h100")


def test_profiles_stay_within_a_chunk(lowered: Lowered) -> None:
    manifest = open_bundle(lowered("fp16")).manifest
    decode, prefill = profiles_for(manifest.recipe, manifest.kv)
    assert decode.shapes(("batch", "tokens", 256)) == ((1, 1, 256), (1, 1, 256), (8, 1, 256))
    assert prefill.shapes(("batch", "tokens")) == ((1, 1), (1, 128), (1, 128))
    with pytest.raises(InputError, match="max_context is 1, expected at least 2"):
        profiles_for(
            dataclasses.replace(manifest.recipe, max_context=1),
            [dataclasses.replace(kv, fixed_rows=1) for kv in manifest.kv],
        )
