"""Synthetic checkpoints: any slice equals the slice of the whole, values behave, and they compile like any other."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.model.checkpoint import load_reference, open_checkpoint
from corral.model.checkpoint.names import expected_parameters
from corral.model.checkpoint.synthetic import SyntheticStore, open_synthetic
from corral.spec.errors import InputError
from corral.spec.presets import PRESETS
from corral.spec.weight_plan import Source

DEBUG = open_checkpoint("synthetic:debug")
NAMES = sorted(DEBUG.store.tensors)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_slice_is_the_slice_of_the_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    where: list[int | slice] = []
    shape = DEBUG.tensors[name].shape
    for axis, n in enumerate(shape):
        start = data.draw(st.integers(0, n - 1))
        whole = axis == len(shape) - 1 or (len(shape) == 3 and axis == 1) or data.draw(st.booleans())
        where.append(slice(start, data.draw(st.integers(start + 1, n))) if whole else start)
    cut = DEBUG.store.read_slice(name, tuple(where))
    assert torch.equal(cut, DEBUG.store.read_slice(name, ())[tuple(where)])
    assert cut.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_mean(name: str) -> None:
    values = DEBUG.store.read_slice(name, ()).float()
    if values.ndim == 1:
        assert values.mean() == pytest.approx(1, abs=0.02) and 0.03 < values.std() < 0.07
        return
    scale = 1.0 if "embed" in name else values.shape[1] ** -0.5
    assert values.median().abs() < 0.05 * scale
    assert float(values.abs().median()) == pytest.approx(0.6745 * scale, rel=0.1)
    if "embed" not in name:
        inputs = values.pow(2).mean(dim=(0, 2) if values.ndim == 3 else 0).sqrt()
        assert 4 < float(inputs.max() / inputs.median()) < 13  # one outlier channel


def test_experts_and_layers_differ_and_the_seed_counts() -> None:
    name = "language_model.model.layers.{}.feed_forward.experts.down_proj"
    experts = DEBUG.store.read_slice(name.format(0), ())
    assert len({expert.float().numpy().tobytes() for expert in experts}) == 16
    assert not torch.equal(experts, DEBUG.store.read_slice(name.format(1), ()))
    other: SyntheticStore = open_synthetic(PRESETS["debug"], "x", seed=1)
    assert not torch.equal(experts, other.read_slice(name.format(0), ()))


def test_all_experts_are_used() -> None:
    model = load_reference(DEBUG)
    chosen: list[set[int]] = []
    for layer in model.layers:
        layer.get_submodule("feed_forward.router").register_forward_hook(
            lambda module, inputs, logits: chosen.append(set(logits.argmax(-1).flatten().tolist()))
        )
    tokens = torch.arange(1024).reshape(8, 128)
    model(model.embed_tokens(tokens), torch.arange(128).expand(8, -1))
    assert len(chosen) == 4 and all(len(experts) >= 12 for experts in chosen)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_the_config(preset: str) -> None:
    checkpoint = open_checkpoint(Path(f"synthetic:{preset}"))  # as the command line spells it
    shapes = expected_parameters(checkpoint.config)
    assert {name: checkpoint.info(name).shape for name in shapes} == shapes
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"bfloat16"}


def test_the_largest_matrix_is_read_by_slice() -> None:
    checkpoint = open_checkpoint("synthetic:behemoth")
    name = checkpoint.source("layers.95.feed_forward.experts.gate_up_proj")
    part = checkpoint.read(Source(name, rows=(48000, 48128), columns=(16000, 16384), index=15, transposed=True))
    assert part.shape == (128, 384)
    assert float(np.abs(part).mean()) == pytest.approx(0.8 / 128, rel=0.1)


def test_a_part_keeps_the_values_of_its_layers() -> None:
    part = open_checkpoint("synthetic:debug?layers=2-3")
    assert part.config.layers == DEBUG.config.layers[2:]
    name = "layers.1.self_attn.q_proj.weight"
    assert part.source(name) == DEBUG.source("layers.3.self_attn.q_proj.weight")
    assert open_checkpoint("synthetic:debug?layers=2").config.layers == DEBUG.config.layers[:2]


def test_it_pickles() -> None:
    again = pickle.loads(pickle.dumps(DEBUG))  # noqa: S301
    assert torch.equal(again.store.read_slice(NAMES[0], ()), DEBUG.store.read_slice(NAMES[0], ()))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("synthetic:scouty", "expected one of scout"),
        ("synthetic:scout?layer=3", "expected one of scout"),
        ("synthetic:scout?layers=48-48", "has 48 layers, 0 to 47"),
        ("synthetic:scout?layers=0", "expected a count"),
        ("synthetic:scout?layers=3-2", "FIRST-LAST"),
    ],
)
def test_a_wrong_name_says_what_is_right(name: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        open_checkpoint(name)
    assert says in str(error.value)
