"""What is gathered of a calibration text, against hooks in the whole model; killed and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from corral.graphs.calibrate.calibrate import statistics_bytes
from corral.graphs.calibrate.gather import gather
from corral.graphs.calibrate.input_sums import InputSums
from corral.graphs.calibrate.statistics import Statistics, input_site, statistics_of
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text

Checkpoint = Callable[[str], Path]
KEY = "0123456789abcdef"
IDS = np.random.default_rng(1).integers(0, 256, (6, 40))  # windows longer than two chunks of 16


def gathered(directory: Path, out: Path, progress: Callable[..., None] = lambda *told: None) -> Statistics:
    checkpoint = open_checkpoint(directory)
    statistics = statistics_of(checkpoint, out, KEY)
    gather(checkpoint, IDS, statistics, products="whole", progress=progress)
    return statistics


def inputs_by_hooks(model: Llama4Text) -> dict[str, torch.Tensor]:
    """Matrix (an expert's with its number) -> all of its inputs [tokens, inputs], from one run of the whole model."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].flatten(0, -2)}))
        if isinstance(module, Experts):
            module.register_forward_pre_hook(
                lambda experts, args, name=name: found.update(experts_inputs(experts, name, *args))
            )
    with torch.no_grad():
        model.logits(torch.tensor(IDS))
    return found


def experts_inputs(experts: Experts, name: str, x: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token by token, as Llama 4 is described: every expert among the top k sees the token times sigmoid(logit)."""
    found: dict[str, list[torch.Tensor]] = {}
    for token, row in zip(x.flatten(0, -2), logits.flatten(0, -2), strict=True):
        for expert in row.argsort(descending=True)[: experts.num_experts_per_tok].tolist():
            routed = token * torch.sigmoid(row[expert])
            gate, up = (routed @ experts.gate_up_proj[expert]).chunk(2)
            found.setdefault(f"{name}.gate_up_proj.{expert}", []).append(routed)
            found.setdefault(f"{name}.down_proj.{expert}", []).append(F.silu(gate) * up)
    return {key: torch.stack(rows) for key, rows in found.items()}


@pytest.mark.parametrize("form", ["scout", "maverick", "guard", "topk2", "tied"])
def test_sums_are_those_of_the_whole_models_inputs(tiny_checkpoint: Checkpoint, tmp_path: Path, form: str) -> None:
    statistics = gathered(tiny_checkpoint(form), tmp_path)
    model = load_reference(open_checkpoint(tiny_checkpoint(form)))
    inputs = {name: x for name, x in inputs_by_hooks(model).items() if not name.endswith("router")}
    for name, x in inputs.items():
        site, _, expert = name.rpartition(".")
        path = statistics.path(site, int(expert)) if expert.isdigit() else statistics.path(input_site(name))
        stored, want = load_file(path), (x.double().T @ x.double()).numpy()
        assert stored["tokens"].item() == len(x)
        assert ("rows" in stored) == (len(x) <= x.shape[1] // 2), "what takes more room is kept"
        hessian = stored["rows"].T @ stored["rows"] if "rows" in stored else stored["hessian"]
        assert np.abs(hessian - want).max() < 1e-5 * np.abs(want).max(), name
        np.testing.assert_allclose(stored["magnitude"], x.abs().sum(0).numpy(), rtol=1e-4)
        np.testing.assert_allclose(stored["largest"], x.abs().amax(0).numpy(), rtol=1e-4, atol=1e-6)
    experts = [name for name in inputs if ".experts." in name]
    for site in {name.rpartition(".")[0] for name in experts}:
        whole = torch.cat([inputs[name] for name in experts if name.startswith(f"{site}.")])
        together = statistics.inputs(site)
        assert together["tokens"].item() == len(whole)
        np.testing.assert_allclose(together["largest"], whole.abs().amax(0).numpy(), rtol=1e-4, atol=1e-6)
    assert len(experts) > 20 or form == "guard", "hardly any expert was visited: this test sees nothing"
    assert not list(tmp_path.glob("hidden-*")), "hidden states were left behind"
    assert not list(tmp_path.glob("*.partial"))


@given(st.lists(st.integers(0, 40), max_size=6))
def test_few_inputs_are_kept_as_they_are_and_many_as_their_products(counts: list[int]) -> None:
    x = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(0))
    sums = InputSums(64, "whole")
    for part in x.split(counts):
        sums.add(part)
    stored = sums.arrays()
    if len(x) <= 32:
        np.testing.assert_array_equal(stored["rows"], x)
    else:
        np.testing.assert_allclose(stored["hessian"], x.T @ x, rtol=1e-4, atol=1e-4)
    assert stored["tokens"].item() == len(x) and len(stored) == 4


@pytest.mark.parametrize("form", ["scout", "maverick", "topk2"])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_no_more_disk_is_used_than_is_asked_for(
    tiny_checkpoint: Checkpoint, tmp_path: Path, form: str, tokens: int
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    ids = np.random.default_rng(4).integers(0, 256, (tokens // 64, 64))
    gather(checkpoint, ids, statistics_of(checkpoint, tmp_path, "k"), products="whole")
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    overhead = 4096 * len(list(tmp_path.iterdir()))  # a header a file, and sums of single inputs
    assert used - overhead < statistics_bytes(checkpoint.config, tokens, "whole") < 20 * used


class KilledError(Exception):
    pass


def test_it_goes_on_where_it_was_killed(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    gathered(tiny_checkpoint("scout"), whole)

    def kill(what: str, done: float, total: float, unit: str) -> None:
        if done > 2.5 * IDS.size:  # in the middle of layer 2
            raise KilledError

    with pytest.raises(KilledError):
        gathered(tiny_checkpoint("scout"), killed, kill)
    assert list(killed.glob("hidden-*-2.bin"))
    told: list[float] = []
    gathered(tiny_checkpoint("scout"), killed, lambda what, done, total, unit: told.append(done))
    assert min(told) == 2 * IDS.size, "layers that were finished were run again"
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in killed.iterdir())
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)
    gathered(tiny_checkpoint("scout"), killed, lambda *_: pytest.fail("nothing was left to do"))
