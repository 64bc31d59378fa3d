"""Opening a checkpoint: what is accepted, what is refused, and that one error says all that is wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.model.checkpoint import load_reference, open_checkpoint
from corral.spec.errors import InputError
from corral.spec.weight_plan import Source

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
WHOLE_Q_PROJ = Source(Q_PROJ, rows=(0, 64), columns=(0, 64))
EXPERTS = "model.layers.2.feed_forward.experts.down_proj"


@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2", "tied"])
def test_every_tensor_arrives_unchanged(form: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    saved = load_file(tiny_checkpoint(form) / "model.safetensors")
    state = checkpoint.state_dict()
    assert {checkpoint.source(name) for name in state} == saved.keys()
    assert all(torch.equal(tensor, saved[checkpoint.source(name)]) for name, tensor in state.items())
    assert checkpoint.dropped == ()


def test_multimodal_names_shards_and_bf16(
    tiny_checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("multimodal")))
    assert checkpoint.config.multimodal
    assert checkpoint.source("lm_head.weight") == "language_model.lm_head.weight"
    assert checkpoint.info("norm.weight").dtype == "bfloat16"
    assert checkpoint.dropped == ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")
    assert len({info.file for info in checkpoint.tensors.values()}) == 2
    scout, multimodal = reference("scout"), load_reference(checkpoint)
    for (name, ours), theirs in zip(multimodal.named_parameters(), scout.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float()), name


def test_newer_nesting_is_accepted(scout_copy: Path, edit_weights: Callable[..., None]) -> None:
    def nest(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)
        tensors["model.vision_model.class_embedding"] = torch.zeros(8)

    edit_weights(scout_copy, nest)
    checkpoint = open_checkpoint(scout_copy)
    assert checkpoint.source("norm.weight") == "model.language_model.norm.weight"
    assert checkpoint.dropped == ("model.vision_model.class_embedding",)


def test_one_error_says_all_that_is_wrong(scout_copy: Path, edit_weights: Callable[..., None]) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        for i in range(12):
            tensors[f"model.layers.0.adapter.{i:02}"] = torch.zeros(1)
        tensors[Q_PROJ] = tensors[Q_PROJ][:5]
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    edit_weights(scout_copy, damage)
    with pytest.raises(InputError) as error:
        open_checkpoint(scout_copy)
    message = str(error.value)
    assert "1 missing: lm_head.weight;" in message
    assert "12 unknown: model.layers.0.adapter.00" in message
    assert "adapter.07 and 4 more" in message
    assert "adapter.08" not in message
    assert f"{Q_PROJ} [5, 64] not [64, 64]" in message
    assert "model.norm.weight float64" in message


def test_missing_shards_are_all_named(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((tiny_checkpoint("multimodal") / name).read_bytes())
    with pytest.raises(InputError, match=r"lacks 2 of the 2 files.*model-00001-of-00002.*, model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_a_hub_cache_of_links_is_resolved(scout_copy: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in scout_copy.iterdir():
        (snapshot / file.name).symlink_to(file)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors[Q_PROJ].file == (scout_copy / "model.safetensors").resolve()
    assert checkpoint.tokenizer() == (scout_copy / "tokenizer.json").read_bytes()
    assert checkpoint.read(WHOLE_Q_PROJ).shape == (64, 64)


def test_a_checkpoint_pickles_into_workers(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("scout"))
    copy = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301
    assert np.array_equal(copy.read(WHOLE_Q_PROJ), checkpoint.read(WHOLE_Q_PROJ))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(scout_copy: Path, name: str) -> None:
    (scout_copy / "model.safetensors").rename(scout_copy / name)
    with pytest.raises(InputError, match=r"no \*\.safetensors file: it holds PyTorch pickles .* safetensors version"):
        open_checkpoint(scout_copy)


def test_paths_that_are_no_checkpoint(scout_copy: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a checkpoint directory"):
        open_checkpoint(scout_copy / "nowhere")
    with pytest.raises(InputError, match="is a file; expected the checkpoint directory"):
        open_checkpoint(scout_copy / "model.safetensors")
    (scout_copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="it holds no weights at all"):
        open_checkpoint(scout_copy)
    (scout_copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        open_checkpoint(scout_copy)


def test_a_stored_head_beside_tied_embeddings_must_equal_them(
    scout_copy: Path, edit_weights: Callable[..., None], edit_json: Callable[..., None]
) -> None:
    edit_json(scout_copy / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"lm_head\.weight is stored and differs from model\.embed_tokens\.weight"):
        open_checkpoint(scout_copy)
    edit_weights(
        scout_copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    checkpoint = open_checkpoint(scout_copy)
    assert checkpoint.dropped == ("lm_head.weight",)
    assert checkpoint.source("lm_head.weight") == "model.embed_tokens.weight"


def test_tied_reference_shares_one_matrix(reference: Callable[[str], Any]) -> None:
    model = reference("tied")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found(
    scout_copy: Path, edit_weights: Callable[..., None], value: float
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERTS][3, 5, 7] = value
        tensors["model.norm.weight"][9] = value

    edit_weights(scout_copy, damage)
    checkpoint = open_checkpoint(scout_copy)
    checkpoint.read(Source(EXPERTS, rows=(0, 64), columns=(0, 64), index=2))
    with pytest.raises(InputError, match=rf"tensor {EXPERTS} holds {value} \(expert 3, row 7, column 5\)"):
        checkpoint.read(Source(EXPERTS, index=3, transposed=True, rows=(6, 9), columns=(4, 8)))
    with pytest.raises(InputError, match=r"model\.norm\.weight .*\(row 9\)"):
        checkpoint.read_raw(Source("model.norm.weight", rows=(4, 64)))


def test_two_loose_files_with_one_tensor_are_refused(scout_copy: Path) -> None:
    (scout_copy / "model.safetensors").rename(scout_copy / "a.safetensors")
    assert open_checkpoint(scout_copy).tensors[Q_PROJ].file.name == "a.safetensors"
    save_file({Q_PROJ: torch.zeros(1)}, scout_copy / "b.safetensors")
    with pytest.raises(InputError, match=f"{Q_PROJ} is in both b.safetensors and a.safetensors"):
        open_checkpoint(scout_copy)
