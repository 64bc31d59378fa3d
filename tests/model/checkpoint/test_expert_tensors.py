"""Experts that are stored one by one look like the fused tensors, are read one at a time, and are missed by name."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.model.checkpoint import Checkpoint, open_checkpoint
from corral.model.checkpoint.expert_tensors import fuse_experts
from corral.model.checkpoint.store import Complaints, TensorInfo, cuts
from corral.spec.errors import InputError
from corral.spec.model_config import parse_config
from corral.spec.weight_plan import Source

EXPERTS = "model.layers.1.feed_forward.experts"
EditWeights = Callable[..., None]


def unfuse(tensors: dict[str, torch.Tensor]) -> None:
    """As a quantizer takes fused experts apart: [experts, inputs, outputs] -> a matrix [outputs, inputs] each."""
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        for e, matrix in enumerate(tensors.pop(name)):
            gate, up = matrix.T.chunk(2)
            tensors[f"{name.removesuffix('.gate_up_proj')}.{e}.gate_proj.weight"] = gate
            tensors[f"{name.removesuffix('.gate_up_proj')}.{e}.up_proj.weight"] = up
    for name in [name for name in tensors if name.endswith("experts.down_proj")]:
        for e, matrix in enumerate(tensors.pop(name)):
            tensors[f"{name.removesuffix('.down_proj')}.{e}.down_proj.weight"] = matrix.T


@pytest.fixture(scope="module")
def unfused(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, edit_weights: EditWeights
) -> Path:
    copy = Path(shutil.copytree(tiny_checkpoint("maverick"), tmp_path_factory.mktemp("unfused") / "copy"))
    edit_weights(copy, unfuse)
    return copy


@pytest.fixture
def unfused_copy(unfused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfused, tmp_path / "copy"))


def test_the_parameters_are_those_of_the_fused_file(tiny_checkpoint: Callable[[str], Path], unfused: Path) -> None:
    fused, ours = open_checkpoint(tiny_checkpoint("maverick")), open_checkpoint(unfused)
    state = ours.state_dict()
    expected = fused.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert ours.info("layers.1.feed_forward.experts.gate_up_proj").shape == (8, 64, 128)
    assert len(ours.tensors[f"{EXPERTS}.gate_up_proj"].parts) == 16


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_slice_of_an_expert_is_the_fused_ones(
    tiny_checkpoint: Callable[[str], Path], unfused: Path, data: st.DataObject
) -> None:
    def cut(n: int) -> tuple[int, int]:
        a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
        return min(a, b), max(a, b)

    name, outputs = data.draw(st.sampled_from([("gate_up_proj", 128), ("down_proj", 64)]))
    transposed = data.draw(st.booleans())
    rows, columns = cut(outputs if transposed else 64), cut(64 if transposed else outputs)
    source = Source(f"{EXPERTS}.{name}", rows, columns, data.draw(st.integers(0, 7)), transposed)
    want = open_checkpoint(tiny_checkpoint("maverick")).read(source)
    assert np.array_equal(pickle.loads(pickle.dumps(open_checkpoint(unfused))).read(source), want)  # noqa: S301


@dataclass(frozen=True)
class Recorder:
    """A store without data that notes what is read of it."""

    tensors: dict[str, TensorInfo]
    read: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def read_slice(self, name: str, where: tuple[int | slice, ...]) -> torch.Tensor:
        self.read.append((name, where))
        return torch.zeros([len(cut) for cut in cuts(self.tensors[name].shape, where) if isinstance(cut, range)])


def test_a_slice_reads_that_slice_of_one_expert_only(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    names = [f"{EXPERTS}.{e}.{matrix}_proj.weight" for e in range(8) for matrix in ("gate", "up", "down")]
    store = Recorder({name: TensorInfo(name, Path("x"), "bfloat16", (64, 64)) for name in names})
    config = parse_config(tiny_config("maverick"))
    complaints: Complaints = {}
    checkpoint = Checkpoint(
        directory=Path("x"), config=config, store=fuse_experts(store, config, complaints), names={}, dropped=()
    )
    assert complaints == {}
    checkpoint.read(Source(f"{EXPERTS}.gate_up_proj", rows=(60, 70), columns=(3, 5), index=4, transposed=True))
    assert store.read == [
        (f"{EXPERTS}.4.gate_proj.weight", (slice(60, 64), slice(3, 5))),
        (f"{EXPERTS}.4.up_proj.weight", (slice(0, 6), slice(3, 5))),
    ]


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        old = tensors.pop(f"{EXPERTS}.{name}.weight")
        if value:
            tensors[f"{EXPERTS}.{name}.weight"] = value(old)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("3.up_proj", None), rf"1 missing: {EXPERTS}\.3\.up_proj\.weight"),
        (
            change("3.down_proj", lambda t: t[:, :5]),
            rf"of another shape than config\.json says: {EXPERTS}\.3\.down_proj\.weight \[64, 5\] not \[64, 64\]",
        ),
        (
            change("3.up_proj", lambda t: t.bfloat16()),
            rf"stored otherwise than the layer's other experts: {EXPERTS}\.3\.up_proj\.weight \(bfloat16\)",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.8.up_proj.weight": torch.zeros(64, 64)}),
            rf"1 unknown: {EXPERTS}\.8\.up_proj\.weight",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.03.up_proj.weight": torch.zeros(64, 64)}),
            rf"1 unknown: {EXPERTS}\.03\.up_proj\.weight",
        ),
    ],
)
def test_what_is_wrong_with_an_expert_is_named(
    unfused_copy: Path, edit_weights: EditWeights, edit: Callable[[Any], None], message: str
) -> None:
    edit_weights(unfused_copy, edit)
    with pytest.raises(InputError, match=message):
        open_checkpoint(unfused_copy)


def test_experts_both_fused_and_one_by_one_are_refused(unfused_copy: Path, edit_weights: EditWeights) -> None:
    edit_weights(unfused_copy, lambda tensors: tensors.update({f"{EXPERTS}.down_proj": torch.zeros(8, 64, 64)}))
    with pytest.raises(InputError, match=rf"both fused and one by one: {EXPERTS}\.down_proj"):
        open_checkpoint(unfused_copy)
