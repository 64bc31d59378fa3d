"""A checkpoint's identity decides whether a compile may go on: it changes with the content, and not with the place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.model.checkpoint.identity import checkpoint_identity
from corral.model.checkpoint.open import open_checkpoint


def identity(directory: Path | str) -> str:
    return checkpoint_identity(open_checkpoint(directory))


def edit_config(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))


def other_dtype(directory: Path) -> None:
    """The time of the file is kept: the header alone tells."""
    file = directory / "model.safetensors"
    times = file.stat()
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def write_again(directory: Path) -> None:
    """The same header and size; other weights may stand behind it."""
    file = directory / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def rename(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "other.safetensors")


@pytest.mark.parametrize("change", [edit_config, other_dtype, write_again, rename])
def test_it_changes_with(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("guard"), tmp_path / "copy"))
    before = identity(copy)
    change(copy)
    assert identity(copy) != before


def test_it_is_the_same_when_moved_and_does_not_read_weights(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint("guard"), tmp_path / "copy"))  # copies the files' times, too
    before = identity(copy)
    copy.rename(tmp_path / "moved")
    monkeypatch.setattr("corral.model.checkpoint.checkpoint.Checkpoint.read", lambda *_: pytest.fail("reads weights"))
    assert identity(tmp_path / "moved") == before
    monkeypatch.chdir(tmp_path)
    assert identity("moved") == before


def test_made_up_checkpoints_have_one_each() -> None:
    names = ("synthetic:debug", "synthetic:debug?layers=2", "synthetic:guard")
    assert len({identity(name) for name in names}) == 3
    assert identity(names[0]) == identity(names[0])
