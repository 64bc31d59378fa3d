"""A rehearsal's digests are those of the bytes that a compile writes, whoever computes them, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.exporter.bind_weights import EMBEDDING_ENTRY
from corral.graphs import rehearse
from corral.graphs.compiler import lower
from corral.graphs.execute.execution import Execution
from corral.graphs.execute.executors import Executor, Serial
from corral.graphs.execute.job import plan_jobs
from corral.graphs.execute.process_pool import ProcessPool
from corral.graphs.execute.shards import shard_name
from corral.graphs.rehearsal import ShardDigest, rehearse_plan, shard_digests
from corral.graphs.split_stages import place_weights, split_stages
from corral.graphs.write_bundle import write_bundle
from corral.model.checkpoint.open import open_checkpoint
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.spec.unfinished import read_journal
from corral.spec.weight_plan import JOB_ELEMENTS, WeightPlan

Checkpoint = Callable[[str], Path]
Bundle = Callable[[str, str, str], Path]
INT4 = Recipe(target="cpu", weights="int4", group_size=32)


def digests_of_files(bundle: Path, job_elements: int = JOB_ELEMENTS) -> dict[str, str]:
    """By the definition, from what a compile has written: each output's bytes are hashed where they lie in the file."""
    plan = WeightPlan.from_json(json.loads((bundle / "plan.json").read_text()))
    outputs = [
        output
        for job in plan_jobs(plan, plan.placements(starts={EMBEDDING_ENTRY}), job_elements)
        for output in job.outputs
    ]
    digests = {}
    for shard in {output.shard for output in outputs}:
        data = (bundle / shard_name(shard)).read_bytes()
        lines = [
            f"{o.offset} {o.nbytes} {hashlib.sha256(data[o.offset : o.offset + o.nbytes]).hexdigest()}\n"
            for o in sorted(outputs, key=lambda o: o.offset)
            if o.shard == shard
        ]
        digests[shard_name(shard)] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return digests


def digests(shards: tuple[ShardDigest, ...]) -> dict[str, str]:
    return {shard.name: shard.sha256 for shard in shards}


@pytest.mark.parametrize(("form", "weights"), [("scout", "int4"), ("maverick", "int8"), ("tied", "fp32")])
def test_a_rehearsal_has_the_digests_of_the_compiled_bundle(
    tiny_checkpoint: Checkpoint, tiny_bundle: Bundle, form: str, weights: str
) -> None:
    bundle = tiny_bundle(form, "cpu", weights)
    rehearsal = rehearse(tiny_checkpoint(form), Recipe(target="cpu", weights=weights, group_size=32))
    assert digests(rehearsal.shards) == digests_of_files(bundle)
    assert rehearsal.bytes == sum(path.stat().st_size for path in bundle.glob("weights-*.bin"))
    tensors = load_file(tiny_checkpoint(form) / "model.safetensors").values()
    assert rehearsal.parameters == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("executor", [Serial(), ProcessPool(2)])
def test_executors_agree_and_so_does_the_journal_of_a_compile(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: Executor
) -> None:
    source = open_checkpoint(tiny_checkpoint("guard"))
    work = lower(source, INT4)
    how = Execution(job_elements=1500, executor=executor)
    placements = place_weights(work, split_stages(work))
    rehearsal = rehearse_plan(work.plan, placements, source.read, how)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("corral.graphs.write_bundle.graph_bytes", interrupted)  # all weights are written by then
    with pytest.raises(KeyboardInterrupt):
        write_bundle(work, source, tmp_path, how=Execution(job_elements=1500, executor=Serial()))
    journal = read_journal(tmp_path)
    assert journal is not None
    jobs = plan_jobs(work.plan, placements, 1500)
    assert len(journal.done) == len(jobs) > 100
    assert rehearsal.shards == shard_digests(jobs, journal.done)


def test_nothing_is_written_and_no_disk_space_is_asked_for(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint("guard"), tmp_path / "checkpoint")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: pytest.fail("a rehearsal needs no disk"))
    rehearse("checkpoint", INT4)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_one_weight_decides_and_a_damaged_one_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("guard"), tmp_path / "checkpoint")
    file, name = tmp_path / "checkpoint" / "model.safetensors", "model.layers.3.self_attn.q_proj.weight"
    whole = rehearse(tmp_path / "checkpoint", INT4)
    tensors = load_file(file)
    tensors[name][5, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert digests(rehearse(tmp_path / "checkpoint", INT4).shards) != digests(whole.shards)
    tensors[name][5, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj\.weight holds nan"):
        rehearse(tmp_path / "checkpoint", INT4)
