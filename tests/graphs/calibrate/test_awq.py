"""AWQ: folding changes nothing, scaled inputs lose less, and the blocks gathered are those of X^T X."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from corral.graphs.calibrate.calibration_text import read_calibration_text
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.input_scales import search_input_scales
from corral.graphs.calibrate.input_sums import InputSums
from corral.graphs.calibrate.statistics import Statistics, statistics_of
from corral.graphs.calibrate.streamed_model import pieces_of
from corral.graphs.quantize.awq import awq, group_blocks, input_scales, rescale
from corral.graphs.quantize.rtn import rtn
from corral.graphs.quantize.rtn_mse import decode
from corral.model.checkpoint.checkpoint import Checkpoint, alternating
from corral.model.checkpoint.names import HEAD
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.spec.recipe import Recipe

TinyCheckpoint = Callable[[str], Path]
AWQ = Recipe(method="awq", group_size=32)
IDS = np.random.default_rng(3).integers(0, 256, (8, 512))


@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2", "tied"])
def test_folding_leaves_the_function_as_it_was(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, form: str) -> None:
    """Every parameter as the plan's steps see it, rescaled and put back into the reference: the same logits."""
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    ids = read_calibration_text(checkpoint, Recipe(calibration_tokens=4096)).ids
    statistics = statistics_of(checkpoint, tmp_path, "0123456789abcdef")
    gather(checkpoint, ids, statistics, products="blocks")
    search_input_scales(checkpoint, statistics, AWQ)
    model = load_reference(checkpoint)
    if form == "tied":  # the head is a matrix of its own from here on; the embedding stays
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    tokens = torch.tensor(ids[:1, :100])
    with torch.no_grad():
        want = model.logits(tokens)
        changed = 0
        for name, parameter in model.named_parameters():
            if not name.startswith("embed"):
                folded = rescaled(checkpoint, statistics, name)
                changed += not torch.equal(folded, parameter)
                parameter.copy_(folded)
        got = model.logits(tokens)
    assert changed > 0.8 * sum(1 for _ in model.parameters()), "hardly anything was scaled: this test sees nothing"
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("kept", "also_unscaled"),
    [
        (r"self_attn\.v_proj", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "input_layernorm"}),
        (r"self_attn\.o_proj", set()),
        (r"\.experts\.(?!down)", {"feed_forward.router", "post_attention_layernorm"}),
        (r"\.experts\.down", set()),
        (r"shared_expert\.up", {"feed_forward.shared_expert.down_proj", "feed_forward.router"}),
        (r"lm_head", {"norm"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_kept_as_published_is_not_scaled(
    published_checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path, kept: str, also_unscaled: set[str]
) -> None:
    """Its codes go into the bundle as they are, so nothing that reads what it makes, or makes what it reads, may change."""
    checkpoint = open_checkpoint(published_checkpoint("two_layers", "int4 g32", kept)[0])
    published = {name for name in (*checkpoint.names, HEAD) if checkpoint.info(name).published}
    assert published and all(re.search(kept, name) for name in published)
    statistics = statistics_of(checkpoint, tmp_path, "0123456789abcdef")
    gather(checkpoint, IDS, statistics, products="blocks")
    search_input_scales(checkpoint, statistics, AWQ)
    model = load_reference(checkpoint).float()
    tokens = torch.tensor(IDS[:1, :100])
    with torch.no_grad():
        want, changed = model.logits(tokens), set()
        for name, parameter in model.named_parameters():
            if not name.startswith("embed"):
                folded = rescaled(checkpoint, statistics, name)
                if not torch.equal(folded, parameter):
                    changed.add(name)
                parameter.copy_(folded)
        got = model.logits(tokens)
    assert not changed & published
    assert not {name for name in changed if name.removeprefix("layers.1.").removesuffix(".weight") in also_unscaled}
    assert len(changed) > 8, "hardly anything was scaled: this test sees nothing"
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_scales_of_gate_and_up_alternate_as_their_rows_do(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """What a job reads of an expert stored with gate and up row by row, cut anywhere, is rescaled as the whole is."""
    checkpoint = open_checkpoint(tiny_checkpoint("scout"))
    statistics = statistics_of(checkpoint, tmp_path, "0123456789abcdef")
    gather(checkpoint, IDS, statistics, products="blocks")
    search_input_scales(checkpoint, statistics, AWQ)
    piece = pieces_of(checkpoint, "layers.0.feed_forward.experts.gate_up_proj")[1]
    whole = rescale(checkpoint.read(piece), statistics=statistics.of(piece))
    assert not np.array_equal(whole[len(whole) // 2 :], checkpoint.read(piece)[len(whole) // 2 :])
    for run in (1, 4):
        rows = alternating(whole[: len(whole) // 2], whole[len(whole) // 2 :], run)
        for cut in ((0, len(whole)), (16, 40)):
            part = dataclasses.replace(piece, interleave=run, rows=cut)
            got = rescale(checkpoint.read_piece(part), statistics=statistics.of(part))
            np.testing.assert_array_equal(got, rows[slice(*cut)])


def rescaled(checkpoint: Checkpoint, statistics: Statistics, name: str) -> torch.Tensor:
    parts = [
        torch.from_numpy(rescale(checkpoint.read(piece), statistics=statistics.of(piece)))
        for piece in pieces_of(checkpoint, name)
    ]
    return torch.stack([part.T for part in parts]) if ".experts." in name else parts[0]


def test_strong_inputs_lose_less() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(32, 128)).astype(np.float32)
    x = (rng.normal(size=(512, 128)) * np.where(np.arange(128) % 16 == 0, 30, 1)).astype(np.float32)
    seen = InputSums(128, "blocks")
    seen.add(torch.from_numpy(x))
    scales = input_scales(np.abs(x).mean(0).astype(np.float64), 0.5)
    stored = awq(weight, bits=4, group_size=32, min_tokens=1, statistics={**seen.arrays(), "input_scales": scales})

    def error(values: np.ndarray) -> float:
        return float(np.square(x @ (values - weight).T).sum())

    ours = error(decode(stored["codes"], stored["scales"], bits=4) / scales)
    plain = rtn(weight, bits=4, group_size=32)
    assert ours < 0.3 * error(decode(plain["codes"], plain["scales"], bits=4))


def test_blocks_are_those_of_the_whole() -> None:
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    blocks, hessian = InputSums(256, "blocks"), x.T @ x
    for part in x.split(20):
        blocks.add(part)
    for size in (32, 64, 128):
        cut = group_blocks(blocks.arrays()["blocks"], size)
        assert cut.shape == (256 // size, size, size)
        for i, block in enumerate(cut):
            part = slice(i * size, (i + 1) * size)
            np.testing.assert_allclose(block, hessian[part, part], rtol=1e-4, atol=1e-4)


def test_a_matrix_cut_by_rows_is_quantized_as_a_whole_one(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("guard"))
    ids = read_calibration_text(checkpoint, Recipe(calibration_tokens=1024)).ids
    statistics = statistics_of(checkpoint, tmp_path, "0123456789abcdef")
    gather(checkpoint, ids, statistics, products="blocks")
    search_input_scales(checkpoint, statistics, AWQ)
    [piece] = pieces_of(checkpoint, "layers.0.feed_forward.up_proj.weight")

    def codes(rows: tuple[int, int]) -> np.ndarray:
        part = dataclasses.replace(piece, rows=rows)
        values, seen = checkpoint.read(part), statistics.of(part)
        return awq(values, bits=4, group_size=32, min_tokens=1, statistics=seen)["codes"]

    stop = piece.rows[1]
    np.testing.assert_array_equal(np.concatenate([codes((0, 48)), codes((48, stop))]), codes((0, stop)))
