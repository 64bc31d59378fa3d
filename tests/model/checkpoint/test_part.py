"""A range of a checkpoint's layers: the reference model's own layers, and nothing else of it changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corral.model.checkpoint import load_reference, open_checkpoint
from corral.spec.errors import InputError

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("form", ["scout", "maverick", "multimodal", "tied"])
def test_a_part_is_the_model_with_only_these_layers(tiny_checkpoint: Checkpoint, form: str) -> None:
    """Layers 1 to 3: of both kinds, and in the maverick form dense ones and others."""
    directory = tiny_checkpoint(form)
    whole = load_reference(open_checkpoint(directory))
    part = open_checkpoint(f"{directory}?layers=1-3")
    model = load_reference(part)
    whole.layers = whole.layers[1:4]
    whole.config = part.config
    ids = torch.arange(40)[None]
    assert torch.equal(model.logits(ids), whole.logits(ids))
    assert open_checkpoint(part.location).config == part.config


@pytest.mark.parametrize("layers", ["", "0", "3-2", "2-9", "x", "-1", "1-", "1--2"])
def test_layers_that_are_not_there_are_refused(tiny_checkpoint: Checkpoint, layers: str) -> None:
    with pytest.raises(InputError, match="FIRST-LAST"):
        open_checkpoint(f"{tiny_checkpoint('scout')}?layers={layers}")
