"""Checkpoints by name, against a stand-in of the Hub (conftest.py). No test has talked to the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.hub import HubName, hub_name
from corral.spec.errors import EnvironmentProblem, InputError

NAME, TOKEN = "herd/tiny-scout", "hf_letmein"
FIRST, SECOND = "1" * 40, "2" * 40  # commits


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def repository(hub: Any, tiny_checkpoint: Callable[[str], Path]) -> Any:
    """The multimodal checkpoint, published; beside it what a repository has besides."""
    files = files_of(tiny_checkpoint("multimodal"))
    more = {"README.md": b"#", "pytorch_model.bin": b"\x80", "original/params.json": b"{}"}
    files |= more | {"original/consolidated.00.pth": b"PK", "consolidated.00.pth": b"PK", "onnx/model.onnx": b"o"}
    return hub.publish(NAME, files)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", HubName("meta-llama/Llama-4-Scout-17B-16E-Instruct")),
        ("a/b@main", HubName("a/b", "main")),
        ("a/b@refs/pr/3", HubName("a/b", "refs/pr/3")),
        ("scout", None),
        ("/a/b", None),
        ("../a/b", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b@../c", None),
        ("synthetic:scout?layers=4", None),
    ],
)
def test_what_is_a_name(text: str, expected: HubName | None) -> None:
    assert hub_name(Path(text)) == expected


def test_a_path_that_is_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "herd/tiny-scout").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(Path(NAME)) is None


def test_a_checkpoint_by_name_is_that_of_the_directory(
    hub: Any, repository: Any, tiny_checkpoint: Callable[[str], Path]
) -> None:
    shown: list[tuple[str, float, float, str]] = []
    checkpoint = open_checkpoint(NAME, progress=lambda *told: shown.append(told))
    local = open_checkpoint(tiny_checkpoint("multimodal"))
    mine, theirs = checkpoint.state_dict(), local.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert checkpoint.config == local.config
    assert checkpoint.tokenizer() == local.tokenizer()
    assert (checkpoint.name, checkpoint.location) == (NAME, f"{NAME}@{FIRST}")
    # Loaders refuse links: the blobs themselves are opened.
    assert all(not info.file.is_symlink() for info in checkpoint.tensors.values())
    weights = sum(len(data) for name, data in repository.commits[FIRST].items() if name.endswith(".safetensors"))
    assert shown[0][0] == f"look up {NAME}"
    assert shown[-1] == ("download", weights, weights, "bytes")


def test_only_what_is_needed_is_asked_for(hub: Any, repository: Any) -> None:
    open_checkpoint(NAME)
    assert hub.asked_for() == hub.asked_for("HEAD") == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_a_file_of_nothing_but_the_image_encoder_is_left_out(hub: Any, repository: Any) -> None:
    from safetensors.torch import load, save

    files = repository.commits[FIRST]
    index = json.loads(files["model.safetensors.index.json"])
    images = [name for name in index["weight_map"] if not name.startswith("language_model.")]
    vision: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = load(files[file])
        vision |= {name: tensors.pop(name) for name in images if name in tensors}
        files[file] = save(tensors)
    files["vision.safetensors"] = save(vision)
    index["weight_map"] |= dict.fromkeys(images, "vision.safetensors")
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert len(open_checkpoint(NAME).state_dict()) > 50
    assert "vision.safetensors" not in hub.asked_for() | hub.asked_for("HEAD")
    assert open_checkpoint(NAME, weights=False).info("norm.weight").dtype == "bfloat16"


def test_the_commit_is_pinned_when_the_branch_moves(hub: Any, repository: Any, tmp_path: Path) -> None:
    from corral.graphs.stages import export_stage, quantize_stage
    from corral.spec.recipe import Recipe

    exported = export_stage(NAME, tmp_path / "exported").manifest
    assert (exported.source["name"], exported.source["revision"]) == (NAME, FIRST)
    assert exported.source["checkpoint"] == f"{NAME}@{FIRST}"
    repository.commits[SECOND] = repository.commits[FIRST] | {"config.json": b"{}"}
    repository.branches["main"] = SECOND
    with pytest.raises(InputError, match="model_type"):
        open_checkpoint(NAME)
    # The next stage goes on with the commit that the first one saw.
    quantized = quantize_stage(
        tmp_path / "exported", tmp_path / "quantized", Recipe(weights="int8", group_size=32)
    ).manifest
    assert quantized.source["revision"] == FIRST
    assert open_checkpoint(f"{NAME}@{FIRST}").location == f"{NAME}@{FIRST}"


def test_a_branch_that_moves_during_the_download(
    hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[[str], Path]
) -> None:
    usage = shutil.disk_usage("/")
    repository.commits[SECOND] = dict.fromkeys(repository.commits[FIRST], b"{}")

    def between_config_and_weights(_: Path) -> Any:
        repository.branches["main"] = SECOND
        return usage

    monkeypatch.setattr(shutil, "disk_usage", between_config_and_weights)
    norm = open_checkpoint(NAME).state_dict()["norm.weight"]
    assert torch.equal(norm, open_checkpoint(tiny_checkpoint("multimodal")).state_dict()["norm.weight"])


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB: what is lost of a broken connection
    shard = "model-00002-of-00002.safetensors"
    hub.break_off[shard] = 5000
    assert open_checkpoint(NAME).state_dict()
    asked = [(method, span) for method, what, span in hub.requests if what == shard and method == "GET"]
    assert asked == [("GET", ""), ("GET", "bytes=5000-")]


def test_whole_files_are_not_fetched_twice(hub: Any, repository: Any) -> None:
    missing = repository.commits[FIRST].pop("model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"has no file model-00002-of-00002\.safetensors, which its"):
        open_checkpoint(NAME)
    repository.commits[SECOND] = repository.commits[FIRST] | {"model-00002-of-00002.safetensors": missing}
    repository.branches["main"] = SECOND
    hub.requests.clear()
    open_checkpoint(NAME)
    assert hub.asked_for() == {"model-00002-of-00002.safetensors"}
    hub.requests.clear()
    open_checkpoint(NAME)
    assert hub.asked_for() == set()


def test_what_was_downloaded_works_offline(hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(EnvironmentProblem, match=r"herd/tiny-scout is no directory here.*HF_HUB_OFFLINE"):
            open_checkpoint(NAME)
    open_checkpoint(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with pytest.raises(EnvironmentProblem, match="nor is all of it in the cache"):
        open_checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    open_checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert open_checkpoint(NAME).location == f"{NAME}@{FIRST}"
    assert open_checkpoint(NAME, weights=False).info("norm.weight").shape == (64,)
    assert hub.requests == []


def test_a_cache_that_an_older_library_filled_works_offline(
    hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import _tree_cache, constants

    open_checkpoint(NAME)
    [trees] = tmp_path.glob("cache/models--*/trees")
    shutil.rmtree(trees)
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(NAME).state_dict()


def test_no_server_at_all(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(EnvironmentProblem, match=r"cannot be had now.*Check the network, HF_ENDPOINT"):
        open_checkpoint(NAME)


def test_a_gated_repository(hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.gated = True
    with pytest.raises(EnvironmentProblem, match=r"is gated: .* Ask for it on the model's page.*`hf auth login`"):
        open_checkpoint(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(EnvironmentProblem, match="is gated"):
        open_checkpoint(NAME, weights=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_checkpoint(NAME).state_dict()


def test_no_such_repository_or_revision(hub: Any, repository: Any) -> None:
    with pytest.raises(InputError, match=r"herd/nothing is neither a directory here nor a repository .* private"):
        open_checkpoint("herd/nothing")
    with pytest.raises(InputError, match="herd/tiny-scout has no branch, tag or commit v2"):
        open_checkpoint(f"{NAME}@v2")
    with pytest.raises(InputError, match="neither a directory here nor the name of a repository"):
        open_checkpoint("herd/tiny--scout..x")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's own, before
def test_a_disk_that_is_too_small(hub: Any, repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(EnvironmentProblem, match=r"GB to download, but the disk of .*cache has 0\.0 GB free.*HF_HOME"):
        open_checkpoint(NAME)
    assert not any(file.endswith(".safetensors") for file in hub.asked_for())


def test_a_plan_reads_headers_only(hub: Any, repository: Any) -> None:
    checkpoint = open_checkpoint(NAME, weights=False)
    spans = [span for method, what, span in hub.requests if what.endswith(".safetensors") and method == "GET"]
    assert len(spans) >= 4
    assert all(re.fullmatch(r"bytes=(0-7|8-\d+)", span) for span in spans)
    assert sorted(checkpoint.dropped)[0] == "multi_modal_projector.linear_1.weight"
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.state_dict()
    damaged = bytearray(repository.commits[FIRST]["model-00002-of-00002.safetensors"])
    damaged[0:8] = (1 << 40).to_bytes(8, "little")
    repository.commits[SECOND] = repository.commits[FIRST] | {"model-00002-of-00002.safetensors": bytes(damaged)}
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors has \d+ bytes and claims a header of"):
        open_checkpoint(f"{NAME}@{SECOND}", weights=False)


def test_metas_own_repository(hub: Any, meta_checkpoint: Callable[[str, int], tuple[Path, Path]]) -> None:
    meta, hugging_face = meta_checkpoint("scout", 2)
    hub.publish(NAME, files_of(meta) | {"LICENSE": b"text"})
    ours, theirs = open_checkpoint(NAME).state_dict(), open_checkpoint(hugging_face).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert hub.asked_for() == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    with pytest.raises(InputError, match="has no safetensors files, whose headers"):
        open_checkpoint(NAME, weights=False)


def test_plan_by_name(hub: Any, repository: Any) -> None:
    from click.testing import CliRunner

    from corral.cli.plan import command

    planned = CliRunner().invoke(command, [NAME, "--json"], catch_exceptions=False)
    assert json.loads(planned.stdout)["model"] == NAME
    assert all(span for method, what, span in hub.requests if method == "GET" and what.endswith(".safetensors"))


def test_the_environment_is_obeyed(hub: Any, repository: Any, tmp_path: Path) -> None:
    repository.gated = True
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    command = [sys.executable, "-m", "corral.cli.main", "plan", NAME, "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == NAME
    assert (tmp_path / "home/hub/models--herd--tiny-scout").is_dir()
