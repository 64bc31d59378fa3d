"""Fixtures for tests that damage checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def scout_copy(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny scout checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint("scout"), tmp_path / "scout"))


@pytest.fixture(scope="session")
def edit_weights() -> Callable[..., None]:
    """`edit_weights(directory, change)`: load the tensors, let `change` alter the dict, save them."""
    from safetensors.torch import load_file, save_file

    def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")

    return edit


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """`edit_json(file, **keys)`: set keys of a JSON object in a file, which may not exist yet."""

    def edit(file: Path, **keys: Any) -> None:
        old: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, **keys}))

    return edit
