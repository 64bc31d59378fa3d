"""Is a checkpoint quantized already, and by which method? A table of those that are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.model.checkpoint.compressed_tensors import open_compressed_tensors
from corral.model.checkpoint.json_file import read_json
from corral.model.checkpoint.store import Complaints, TensorStore
from corral.spec.errors import InputError

# config.json's `quant_method` -> the store with its quantized matrices as tensors again.
METHODS: dict[str, Callable[[TensorStore, dict[str, Any], str, Complaints], TensorStore]] = {
    "compressed-tensors": open_compressed_tensors,
}


def open_quantized(store: TensorStore, config: Path, complaints: Complaints) -> TensorStore:
    """`store` as `config`.json's `quantization_config` says it is to be read; itself where it says nothing.

    Raises InputError for a method that is not read. Tensors that do not fit it are added to `complaints`.
    """
    found = read_json(config)
    text = found.get("text_config")
    for part in (found, text if isinstance(text, dict) else {}):
        quantization = part.get("quantization_config")
        if not quantization:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in METHODS:
            raise InputError(
                f"{config} says that the weights are quantized ({str(method or quantization)[:80]}); of these corral reads "
                f"{', '.join(METHODS)}. Give corral such a checkpoint, or the original one."
            )
        return METHODS[method](store, quantization, f"{config}: quantization_config", complaints)
    return store
