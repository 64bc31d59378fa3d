"""Checkpoints that the compressed-tensors library wrote: the numbers it means, by slice, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from corral.model.checkpoint import Checkpoint, open_checkpoint
from corral.model.checkpoint.compressed_tensors import open_compressed_tensors
from corral.model.checkpoint.expert_tensors import ExpertStore
from corral.model.checkpoint.identity import checkpoint_identity
from corral.model.checkpoint.quantized import QuantizedStore
from corral.model.checkpoint.safetensors import open_safetensors
from corral.model.checkpoint.store import TensorInfo, TensorStore
from corral.spec.errors import InputError
from corral.spec.weight_plan import Source

Published = Callable[..., tuple[Path, Path]]
SCHEMES = [
    "fp8 per output", "fp8 per tensor", "fp8 per 16x32 block", "int4 g32", "int4 g32 asymmetric", "int4 per output",
]  # fmt: skip
LAYER = "language_model.model.layers.1.feed_forward"
GATE_UP = f"{LAYER}.experts.gate_up_proj"
GATE_3 = f"{LAYER}.experts.3.gate_proj"
SHARED = f"{LAYER}.shared_expert.up_proj"


@pytest.mark.parametrize("published", SCHEMES)
def test_every_number_is_what_the_library_means(published_checkpoint: Published, published: str) -> None:
    quantized, plain = (open_checkpoint(directory) for directory in published_checkpoint("maverick", published))
    state, expected = quantized.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name].float(), expected[name].float()), name
        in_mlp = "feed_forward" in name and "router" not in name
        assert quantized.info(name).published == (published if in_mlp else ""), name
        assert quantized.info(name).shape == plain.info(name).shape


def test_the_published_form_of_maverick(published_checkpoint: Published) -> None:
    """Only routed experts are quantized; what is not keeps its own type."""
    directory, _ = published_checkpoint("maverick", "fp8 per output", r"feed_forward\.experts\.")
    stored, checkpoint = load_file(directory / "model.safetensors"), open_checkpoint(directory)
    assert stored[f"{GATE_3}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{GATE_3}.weight_scale"].shape == (64, 1)
    kinds = {(info.dtype, info.published) for info in checkpoint.tensors.values()}
    assert kinds == {("bfloat16", ""), ("float32", "fp8 per output")}
    assert checkpoint.info("layers.1.feed_forward.shared_expert.up_proj.weight").dtype == "bfloat16"


@pytest.fixture(scope="module", params=SCHEMES)
def both(published_checkpoint: Published, request: pytest.FixtureRequest) -> tuple[Checkpoint, Checkpoint]:
    quantized, plain = published_checkpoint("maverick", request.param)
    return open_checkpoint(quantized), open_checkpoint(plain)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_slice_is_that_slice_of_the_whole(both: tuple[Checkpoint, Checkpoint], data: st.DataObject) -> None:
    cut = st.tuples(st.integers(0, 64), st.integers(0, 64)).map(lambda ab: (min(ab), max(ab)))
    wide = st.tuples(st.integers(0, 128), st.integers(0, 128)).map(lambda ab: (min(ab), max(ab)))
    index = data.draw(st.sampled_from([None, 0, 3, 7]))
    source = (
        Source(f"{SHARED}.weight", rows=data.draw(cut), columns=data.draw(cut))
        if index is None
        else Source(GATE_UP, rows=data.draw(wide), columns=data.draw(cut), index=index, transposed=True)
    )
    quantized, plain = both
    got = quantized.read(source)
    assert got.shape == source.shape
    assert np.array_equal(got, plain.read(source))


def test_codes_are_read_as_they_are_stored(published_checkpoint: Published) -> None:
    directory, plain = published_checkpoint("maverick", "int4 g32")
    checkpoint, tensors = open_checkpoint(directory), load_file(directory / "model.safetensors")
    source = Source(GATE_UP, rows=(60, 70), columns=(32, 64), index=3, transposed=True, as_stored=True)
    got = pickle.loads(pickle.dumps(checkpoint)).read_piece(source)  # noqa: S301
    names = [f"{LAYER}.experts.3.{part}_proj" for part in ("gate", "up")]
    octets = np.concatenate([tensors[f"{name}.weight_packed"].numpy().view(np.uint8) for name in names])
    codes = np.stack([octets & 15, octets >> 4], axis=-1).reshape(128, 64)
    assert np.array_equal(got["codes"], codes[60:70, 32:64])
    scales = torch.cat([tensors[f"{name}.weight_scale"] for name in names]).float().numpy()
    assert np.array_equal(got["scales"], scales[60:70, 1:2])
    values = (got["codes"].astype(np.float32) - 8) * got["scales"]
    assert np.array_equal(values, open_checkpoint(plain).read(Source(GATE_UP, (60, 70), (32, 64), 3, True)))


def test_a_packed_word_by_hand(tmp_path: Path) -> None:
    """0x76543210 holds the codes 0, 1, … 7 in that order, which are -8 … -1."""
    save_file(
        {
            "x.weight_packed": torch.tensor([[0x76543210, -1]], dtype=torch.int32),
            "x.weight_scale": torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16),
            "x.weight_shape": torch.tensor([1, 16]),
        },
        tmp_path / "model.safetensors",
    )
    group = {"weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 8}}
    config = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    complaints: dict[str, list[str]] = {}
    store = open_compressed_tensors(open_safetensors(tmp_path), config, "config.json", complaints)
    assert complaints == {}
    assert store.read_slice("x.weight", ()).tolist() == [[-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5] + [14.0] * 8]


def test_the_identity_follows_the_files_of_the_scales(quantized_copy: Path) -> None:
    tensors = load_file(quantized_copy / "model.safetensors")
    (quantized_copy / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}
    save_file(scales, quantized_copy / "scales.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in scales}, quantized_copy / "rest.safetensors")
    before = checkpoint_identity(open_checkpoint(quantized_copy))
    assert checkpoint_identity(open_checkpoint(quantized_copy)) == before
    os.utime(quantized_copy / "scales.safetensors", (1, 1))
    assert checkpoint_identity(open_checkpoint(quantized_copy)) != before


@dataclass(frozen=True)
class Recorder:
    """A store that notes what is read of another."""

    store: TensorStore
    read: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.store.tensors

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> torch.Tensor:
        self.read.append((name, where))
        return self.store.read_slice(name, where)


@pytest.mark.parametrize("as_stored", [False, True])
def test_a_slice_reads_its_words_and_scales_of_one_expert_only(
    published_checkpoint: Published, as_stored: bool
) -> None:
    checkpoint = open_checkpoint(published_checkpoint("maverick", "int4 g32")[0])
    assert isinstance(checkpoint.store, ExpertStore) and isinstance(checkpoint.store.stored, QuantizedStore)
    recorder = Recorder(checkpoint.store.stored.stored)
    quantized = dataclasses.replace(checkpoint.store.stored, stored=recorder)
    watched = dataclasses.replace(checkpoint, store=dataclasses.replace(checkpoint.store, stored=quantized))
    watched.read_piece(Source(GATE_UP, (8, 10), (32, 64), index=3, transposed=True, as_stored=as_stored))
    rows = slice(8, 10)
    assert recorder.read == [
        (f"{GATE_3}.weight_packed", (rows, slice(4, 8))),
        (f"{GATE_3}.weight_scale", (rows, slice(1, 2))),
    ]


def test_scales_of_activations_are_dropped_and_named(quantized_copy: Path, edit_weights: Callable[..., None]) -> None:
    extra = [f"{SHARED}.input_scale", "language_model.model.layers.0.self_attn.k_scale"]
    edit_weights(quantized_copy, lambda tensors: tensors.update({name: torch.ones(1) for name in extra}))
    assert set(open_checkpoint(quantized_copy).dropped) == set(extra)


@pytest.fixture
def quantized_copy(published_checkpoint: Published, tmp_path: Path) -> Path:
    """A copy of a quantized checkpoint, to damage."""
    return Path(shutil.copytree(published_checkpoint("maverick", "int4 g32")[0], tmp_path / "copy"))


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(f"{GATE_3}.weight_scale"), rf"1 quantized without scales: {GATE_3}\.weight_packed lacks weight_scale"),
        (drop(f"{GATE_3}.weight_packed"), rf"1 scales of weights that are not quantized: {GATE_3}\.weight_scale"),
        (
            put(f"{GATE_3}.weight_scale", lambda scale: scale[:, :1]),
            rf"scales of another shape than quantization_config says: {GATE_3}\.weight_scale \[64, 1\] not \[64, 2\]",
        ),
        (put(f"{GATE_3}.weight_scale", lambda scale: scale.double()), rf"{GATE_3}\.weight_scale float64"),
        (
            put(f"{GATE_3}.weight_shape", lambda shape: shape * 2),
            rf"1 weight_shape that disagrees: {GATE_3}\.weight_shape \[128, 128\] not \[64, 64\]",
        ),
        (
            put(f"{GATE_3}.weight_shape", lambda shape: shape[:1]),
            rf"{GATE_3}\.weight_shape of shape \[1\] not \[64, 64\]",
        ),
        (
            put(f"{GATE_3}.weight_zero_point", lambda _: torch.zeros(8, 2, dtype=torch.int32)),
            rf"{GATE_3}\.weight_zero_point beside symmetric weights",
        ),
        (
            put(f"{GATE_3}.weight_packed", lambda packed: packed.long()),
            rf"not stored as quantized matrices are: {GATE_3}\.weight_packed int64 \[64, 8\]",
        ),
        (
            put(f"{SHARED}.weight_packed", lambda packed: packed[:5]),
            rf"{SHARED}\.weight_scale \[64, 2\] not \[5, 2\]",
        ),
        (
            put(f"{GATE_3}.weight_packed", lambda packed: packed[:, :0]),
            rf"not stored as quantized matrices are: {GATE_3}\.weight_packed int32 \[64, 0\]",
        ),
        (put(f"{GATE_3}.weight_g_idx", lambda _: torch.zeros(64)), rf"1 unknown: {GATE_3}\.weight_g_idx"),
    ],
)
def test_what_does_not_fit_together_is_named(
    quantized_copy: Path, edit_weights: Callable[..., None], damage: Callable[[Any], object], message: str
) -> None:
    edit_weights(quantized_copy, damage)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(quantized_copy)
    assert "\n" not in str(error.value)


def test_one_defect_is_told_once(quantized_copy: Path, edit_weights: Callable[..., None]) -> None:
    edit_weights(quantized_copy, drop(f"{GATE_3}.weight_scale"))
    with pytest.raises(InputError) as error:
        open_checkpoint(quantized_copy)
    assert str(error.value).count(GATE_3) == 1


def test_a_damaged_head_beside_tied_embeddings_is_named(
    published_checkpoint: Published, edit_weights: Callable[..., None], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(published_checkpoint("tied", "int4 g32")[0], tmp_path / "copy"))
    head = "language_model.lm_head.weight_packed"
    edit_weights(copy, put(head, lambda _: torch.zeros(320, 8, dtype=torch.int32)))
    with pytest.raises(InputError, match=f"1 quantized without scales: {head} lacks weight_scale"):
        open_checkpoint(copy)


def test_one_error_says_all_that_is_wrong(quantized_copy: Path, edit_weights: Callable[..., None]) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        del tensors[f"{GATE_3}.weight_scale"]
        tensors[f"{SHARED}.weight_shape"] += 1
        for last in ("packed", "scale", "shape"):
            del tensors[f"{LAYER}.experts.5.down_proj.weight_{last}"]
        tensors["language_model.model.surprise"] = torch.zeros(1)

    edit_weights(quantized_copy, damage)
    with pytest.raises(InputError) as error:
        open_checkpoint(quantized_copy)
    for name in (f"{GATE_3}.weight_packed", f"{SHARED}.weight_shape", f"{LAYER}.experts.5.down_proj", "model.surprise"):
        assert name in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.25])
@pytest.mark.parametrize("published", ["int4 g32", "fp8 per output"])
def test_a_scale_that_is_no_positive_number_is_named_when_read(
    published_checkpoint: Published, edit_weights: Callable[..., None], tmp_path: Path, published: str, value: float
) -> None:
    copy = Path(shutil.copytree(published_checkpoint("maverick", published)[0], tmp_path / "copy"))

    def damage(tensors: dict[str, Any]) -> None:
        tensors[f"{GATE_3}.weight_scale"][7, -1] = value

    edit_weights(copy, damage)
    checkpoint = open_checkpoint(copy)
    checkpoint.read(Source(GATE_UP, rows=(8, 64), columns=(0, 64), index=3, transposed=True))
    message = rf"tensor {GATE_3}\.weight_scale holds {value} \(row 7, column {int('int4' in published)}\)"
    for as_stored in [False, True][: 1 + ("int4" in published)]:
        source = Source(GATE_UP, rows=(4, 64), columns=(32, 64), index=3, transposed=True, as_stored=as_stored)
        with pytest.raises(InputError, match=message):
            checkpoint.read_piece(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"weights are quantized \(gptq\); of these corral reads compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, r"weights are quantized \(fbgemm_fp8\)"),
        ({"quant_method": None}, "of these corral reads compressed-tensors"),
        ({"format": "nvfp4-pack-quantized"}, r'format is "nvfp4-pack-quantized"; corral reads float-quantized'),
        ({"format": "float-quantized"}, "in float-quantized corral reads float, 8 bits, strategy tensor or channel"),
        ({"quantization_status": "frozen"}, 'quantization_status is "frozen", expected "compressed"'),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": 1}}}, "corral reads weights without one"),
        ({"config_groups": {}}, "config_groups is {}, expected an object of groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "expected an object of groups"),
        ({"num_bits": 8}, "weights of type int, 8 bits, strategy group; in pack-quantized corral reads int, 4 bits"),
        ({"num_bits": "4"}, "num_bits is '4', expected a whole number"),
        ({"type": "float"}, "weights of type float, 4 bits"),
        ({"strategy": "tensor_group"}, "strategy tensor_group"),
        ({"strategy": ["group"]}, r"strategy \['group'\]"),
        ({"group_size": 0}, "group_size is 0, expected a positive number of inputs"),
        ({"group_size": None}, "group_size is missing"),
        ({"actorder": "group"}, r"actorder is group: inputs are stored in another order \(weight_g_idx\)"),
        ({"symmetric": False}, "weight_zero_point is missing"),
        ({"group_size": 16}, r"weight_scale \[64, 2\] not \[64, 4\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantization_that_is_not_read_is_named(
    quantized_copy: Path, change: dict[str, Any], message: str, nested: bool
) -> None:
    config = json.loads((quantized_copy / "config.json").read_text())
    quantization = config["quantization_config"]
    of_weights = quantization["config_groups"]["group_0"]["weights"]
    (of_weights if change.keys() & {*of_weights, "actorder"} else quantization).update(change)
    if nested:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (quantized_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(quantized_copy)


def test_act_order_in_calibration_only_changes_nothing(quantized_copy: Path) -> None:
    config = json.loads((quantized_copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "static"
    (quantized_copy / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(quantized_copy).tensors[GATE_UP].published == "int4 g32"


def test_quantized_tensors_without_a_word_in_the_config_are_refused(
    published_checkpoint: Published, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(published_checkpoint("maverick", "fp8 per output")[0], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unknown: .*weight_scale.*of another dtype than.*float8_e4m3fn"):
        open_checkpoint(copy)
