"""Fixtures for tests of the reference model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Reference = Callable[[str], Any]


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Reference:
    """`reference("scout")` -> the tiny checkpoint of that form in `Llama4Text`, loaded once."""
    from corral.model.checkpoint import load_reference, open_checkpoint

    return cache(lambda form: load_reference(open_checkpoint(tiny_checkpoint(form))))
