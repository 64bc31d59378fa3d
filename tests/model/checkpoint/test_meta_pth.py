"""Meta's consolidated.*.pth: the same model as its Hugging Face form, read by slice, and refused where it is not right."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.model.checkpoint import Checkpoint, open_checkpoint
from corral.model.checkpoint.identity import checkpoint_identity
from corral.spec.errors import InputError
from corral.spec.weight_plan import Source

MetaCheckpoint = Callable[[str, int], tuple[Path, Path]]
GATES = "layers.1.feed_forward.experts.moe_w_in_eD_F"
EXPERTS = "model.layers.2.feed_forward.experts.gate_up_proj"


@pytest.fixture
def copy(meta_checkpoint: MetaCheckpoint, tmp_path: Path) -> Path:
    """Meta's form of the tiny scout in two shards, to damage."""
    return Path(shutil.copytree(meta_checkpoint("scout", 2)[0], tmp_path / "meta"))


def edit(directory: Path, change: Callable[[dict[str, Any]], object], shards: tuple[int, ...] = (0, 1)) -> None:
    for rank in shards:
        file = directory / f"consolidated.{rank:02}.pth"
        with torch.serialization.safe_globals([io.BytesIO]):
            state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)


def edit_params(directory: Path, **keys: Any) -> None:
    file = directory / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize(("form", "shards"), [("scout", 1), ("scout", 2), ("maverick", 2), ("guard", 2), ("topk2", 2)])
def test_every_value_is_that_of_the_hugging_face_form(form: str, shards: int, meta_checkpoint: MetaCheckpoint) -> None:
    meta, hugging_face = (open_checkpoint(path) for path in meta_checkpoint(form, shards))
    ours, theirs = meta.state_dict(), hugging_face.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "vision_projection.weight" in meta.dropped
    same = "layers", "rope_scaling", "num_experts_per_tok", "use_qk_norm", "attention_chunk_size", "floor_scale"
    assert [getattr(meta.config, key) for key in same] == [getattr(hugging_face.config, key) for key in same]
    assert meta.config.intermediate_size_mlp == 128


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_equals_that_of_the_whole(data: st.DataObject, meta_checkpoint: MetaCheckpoint) -> None:
    meta, hugging_face = (open_checkpoint(path) for path in meta_checkpoint("scout", 2))
    name = data.draw(st.sampled_from(sorted(hugging_face.tensors)))
    where: list[int | slice] = []
    for size in hugging_face.tensors[name].shape[: data.draw(st.integers(0, 3))]:
        first = data.draw(st.integers(0, size - 1))
        last = data.draw(st.integers(first, size))
        where.append(first if data.draw(st.booleans()) else slice(first, last))
    expected = hugging_face.store.read_slice(name, ())[tuple(where)]
    assert torch.equal(meta.store.read_slice(name, tuple(where)), expected)


def test_bf16_and_workers(copy: Path) -> None:
    def halve(state: dict[str, Any]) -> None:
        state.update({name: t.bfloat16() for name, t in state.items() if isinstance(t, torch.Tensor)})

    edit(copy, halve)
    checkpoint = open_checkpoint(copy)
    assert checkpoint.info("layers.2.feed_forward.experts.gate_up_proj").dtype == "bfloat16"
    again: Checkpoint = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301
    one = Source(EXPERTS, rows=(3, 90), columns=(5, 60), index=4, transposed=True)
    assert (again.read(one) == checkpoint.read(one)).all()


def test_the_bundle_says_what_that_of_the_hugging_face_form_says(
    meta_checkpoint: MetaCheckpoint, tmp_path: Path
) -> None:
    from corral.graphs import compile
    from corral.runtime import LLM
    from corral.spec.recipe import Recipe

    tokens = [int(i) for i in torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(0))]
    logits = []
    for number, path in enumerate(meta_checkpoint("scout", 2)):
        out = tmp_path / str(number)
        bundle = compile(path, out, Recipe(target="cpu", weights="int4", group_size=32))
        assert bundle.manifest.model.num_layers == 5
        logits.append(LLM(out).score(tokens))
    assert logits[0].shape == (40, 320)
    assert (logits[0] == logits[1]).all()


def test_the_identity_follows_every_shard(copy: Path) -> None:
    before = checkpoint_identity(open_checkpoint(copy))
    os.utime(copy / "consolidated.01.pth", (1, 1))
    assert checkpoint_identity(open_checkpoint(copy)) != before


class Spy:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_pickle_is_named_and_not_run(copy: Path, tmp_path: Path) -> None:
    edit(copy, lambda state: state.update(extra=Spy(tmp_path / "made")), shards=(1,))
    with pytest.raises(InputError, match=r"consolidated\.01\.pth holds code: it would load posix\.mkdir"):
        open_checkpoint(copy)
    assert not (tmp_path / "made").exists()


def test_code_that_the_list_of_imports_does_not_show_is_not_run(copy: Path, tmp_path: Path) -> None:
    """Protocol 4 puts an import's name together on the stack."""
    body = pickle.dumps({"a": Spy(tmp_path / "made")}, protocol=4)
    rewrite(copy / "consolidated.01.pth", {"data.pkl": lambda _: body})
    with pytest.raises(InputError, match=r"consolidated\.01\.pth is a pickle that holds more than tensors"):
        open_checkpoint(copy)
    assert not (tmp_path / "made").exists()


def rewrite(file: Path, records: dict[str, Callable[[bytes], bytes]]) -> None:
    """Replace records of a torch.save archive, by the end of their names."""
    with zipfile.ZipFile(file) as archive:
        old = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in old.items():
            change = next((c for end, c in records.items() if name.endswith(end)), lambda data: data)
            archive.writestr(name, change(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: os.truncate(d / "consolidated.01.pth", 5000), r"01\.pth is truncated"),
        (lambda d: (d / "consolidated.01.pth").write_bytes(b""), "is not a file of torch.save"),
        (lambda d: (d / "consolidated.00.pth").unlink(), r"has consolidated\.01\.pth; expected consolidated\.00"),
        (lambda d: (d / "consolidated.01.pth").unlink(), r"has 1 of 2 shards: layers\.0\.attention\.wo\.weight is \[64, 32\]"),
        (lambda d: (d / "params.json").unlink(), r"but no params\.json"),
        (lambda d: (d / "fp8_scales_0.pt").touch(), r"quantized weights \(fp8_scales_0\.pt"),
        (lambda d: (d / "int4_scales_1.pt").touch(), r"quantized weights \(int4_scales_1\.pt"),
        (lambda d: edit_params(d, quantization_args={"group_size": 32}), "has quantization_args: these weights are"),
        (lambda d: edit_params(d, vocab_size=999), "vocab_size is 999, but the embedding has 320 rows"),
        (lambda d: edit_params(d, ffn_exp=8.0), r"shape than params.json says: layers\.0\.feed_forward.* not \[64, 64\]"),
        (lambda d: edit_params(d, ffn_exp=1e200), "ffn_exp is 1e\\+200, expected a factor of at most 1024"),
        (lambda d: edit_params(d, n_layers=6), r"missing: model\.layers\.5"),
        (lambda d: edit_params(d, n_layers=4), r"unknown: layers\.4\.attention"),
        (lambda d: edit_params(d, head_dim=32), "dim 64 is not n_heads 4 times head_dim 32"),
        (lambda d: edit_params(d, moe_args=[1]), "moe_args is .1., expected an object"),
        (lambda d: edit(d, lambda s: s.pop("output.weight"), (1,)), r"01\.pth disagree about output\.weight"),
        (lambda d: edit(d, lambda s: s.pop("tok_embeddings.weight")), r"have no tok_embeddings\.weight"),
        (lambda d: edit(d, lambda s: s.pop("layers.3.feed_forward.experts.moe_w_swiglu_eD_F")), "missing: model.layers.3"),
        (
            lambda d: edit(d, lambda s: s.update({GATES: s[GATES].bfloat16()})),
            r"1 of two dtypes: layers\.1\.feed_forward\.experts\.gate_up_proj",
        ),
        (lambda d: edit(d, lambda s: s.update({"adapter": torch.ones(1)})), "1 unknown: adapter"),
        (
            lambda d: edit(d, lambda s: s.update({"layers.0.attention.wq.weight": torch.ones(32, 64)})),
            r"stored twice, fused and not: layers\.0\.self_attn\.q_proj",
        ),
        (
            lambda d: edit(d, lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.float8_e4m3fn)})),
            r"of another dtype than .* model\.norm\.weight float8_e4m3fn",
        ),
        (lambda d: rewrite(d / "consolidated.01.pth", {"/data/3": lambda data: data[:-4]}), "is damaged"),
        (lambda d: rewrite(d / "consolidated.01.pth", {"data.pkl": lambda data: data[:-9]}), "is damaged|more than"),
        (lambda d: rewrite(d / "consolidated.01.pth", {"byteorder": lambda _: b"big"}), "big-endian"),
        (lambda d: torch.save([1, 2], d / "consolidated.01.pth"), "holds a list, expected a dict"),
        (
            lambda d: torch.save({}, d / "consolidated.01.pth", _use_new_zipfile_serialization=False),
            "is a bare pickle, as torch.save wrote before PyTorch 1.6",
        ),
    ],
)  # fmt: skip
def test_what_is_not_right_is_named(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["layers.1.feed_forward.router_DE", "norm.weight"])
def test_copies_that_differ_between_shards_are_refused_when_read(copy: Path, name: str) -> None:
    edit(copy, lambda state: state[name].mul_(2), shards=(1,))
    with pytest.raises(InputError, match="must be the same in every shard, and is not"):
        open_checkpoint(copy).state_dict()


def test_a_number_that_is_not_finite_is_named(copy: Path) -> None:
    edit(copy, lambda state: state["layers.2.feed_forward.experts.moe_w_swiglu_eD_F"].__setitem__((70, 3), math.nan))
    one = Source(EXPERTS, rows=(0, 64), columns=(0, 128), index=1)
    with pytest.raises(InputError, match=r"gate_up_proj holds nan \(expert 1, row 6, column 67\) and 2 numbers"):
        open_checkpoint(copy).read(one)


READ_ONE_EXPERT = """
import resource, sys
from pathlib import Path
from corral.model.checkpoint.meta_pth import Box, JoinedTensor, MetaStore
from corral.model.checkpoint.store import TensorInfo
from corral.model.checkpoint.torch_file import read_tensors
stored = read_tensors(Path(sys.argv[1]))["experts"]
boxes = tuple(Box(stored.unflatten(128), (0, 0, half * 512)) for half in (0, 1))
store = MetaStore({"x": TensorInfo("x", stored.file, "float32", (128, 256, 1024))}, {"x": JoinedTensor(boxes, False)})
assert store.read_slice("x", (0,)).sum() == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert store.read_slice("x", (100,)).shape == (256, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_one_expert_costs_one_expert(tmp_path: Path) -> None:
    """128 experts, 64 MiB a shard; one has half a MiB."""
    torch.save({"experts": torch.zeros(128 * 256, 512)}, tmp_path / "consolidated.00.pth")
    done = subprocess.run(
        [sys.executable, "-c", READ_ONE_EXPERT, str(tmp_path / "consolidated.00.pth")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 16 << 10, f"{int(done.stdout) >> 10} MiB for an expert of 1 MiB"
