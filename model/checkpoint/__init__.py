"""Checkpoints: open one, check it against its config, read any slice of its weights."""

from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.checkpoint.store import TensorInfo, TensorStore

__all__ = ["Checkpoint", "TensorInfo", "TensorStore", "load_reference", "open_checkpoint"]
