"""An opened, checked checkpoint: its config, and its weights by slice under our own names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corral.model.checkpoint import tokenizer_files
from corral.model.checkpoint.hub import HubName
from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.model.checkpoint.store import QuantizedTensorStore, TensorInfo, TensorStore
from corral.model.checkpoint.synthetic import is_synthetic
from corral.spec.errors import InputError
from corral.spec.model_config import ModelConfig
from corral.spec.weight_plan import Source


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Made by `open_checkpoint`. Plain data without open files: it pickles into worker processes."""

    directory: Path
    config: ModelConfig
    store: TensorStore
    names: Mapping[str, str]  # our parameter -> its tensor; every parameter of the config is there
    dropped: tuple[str, ...]  # tensors that are deliberately not read
    part: str = ""  # "?layers=4-7" where these are not all layers
    config_name: str = "config.json"  # the file that describes the model
    hub: HubName | None = None  # the repository that it is of, pinned to a commit

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by its own name, dropped ones included."""
        return self.store.tensors

    def source(self, name: str) -> str:
        """What the checkpoint calls our parameter `name`; a tied `lm_head.weight` is the embedding's tensor."""
        tied = name == HEAD and self.config.tie_word_embeddings
        return self.names[EMBEDDING if tied else name]

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of our parameter `name`."""
        return self.tensors[self.source(name)]

    def read(self, source: Source) -> NDArray[np.float32]:
        """The slice as float32, bf16 and fp16 widened exactly. Raises InputError where a number is NaN or infinite."""
        view = self._view(source)
        # Transposed in its own type first, which torch does in blocks, and then widened: faster than both together.
        values: NDArray[np.float32] = torch.empty(view.shape, dtype=view.dtype).copy_(view).float().numpy()
        _refuse_non_finite(values, source)
        return values

    def read_piece(self, source: Source) -> Any:
        """What a plan's steps begin with: the values, as `read` gives them, or with `as_stored` a dict of arrays.

        Those are "codes", "scales" and maybe "zeros": as `QuantizedTensorStore.read_codes` says, seen as `source` says.
        """
        if source.interleave:
            stored = self.tensors[source.tensor].shape
            gate, up = source.halves(stored[-1] if source.transposed else stored[-2])
            return alternating(self.read_piece(gate), self.read_piece(up), source.interleave)
        if not source.as_stored:
            return self.read(source)
        store: QuantizedTensorStore = self.store  # type: ignore[assignment]  # such a source is of a quantized tensor
        parts = store.read_codes(source.tensor, self._where(source))
        return {name: (part.t() if source.transposed else part).contiguous().numpy() for name, part in parts.items()}

    def read_raw(self, source: Source) -> NDArray[np.generic]:
        """The slice in the checkpoint's own dtype; numpy has no bfloat16, so its bits come as uint16."""
        view = self._view(source)
        if not bool(torch.isfinite(view).all()):
            _refuse_non_finite(view.float().numpy(), source)
        values = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        return values.view(torch.uint16).numpy() if view.dtype == torch.bfloat16 else values.numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter, whole, under our names in its own dtype: for models that fit in memory."""
        return {name: self.store.read_slice(tensor, ()).clone() for name, tensor in self.names.items()}

    def tokenizer(self) -> bytes | None:
        """The content of `tokenizer.json`, or None. Takes seconds where Meta's `tokenizer.model` must be converted."""
        return tokenizer_files.read_tokenizer(self.directory)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: those of `generation_config.json`, then those only `config.json` has."""
        return tuple(dict.fromkeys((*tokenizer_files.read_eos_token_ids(self.directory), *self.config.eos_token_ids)))

    def chat_template(self) -> str | None:
        """Jinja source of the chat template, or None."""
        return tokenizer_files.read_chat_template(self.directory)

    def special_tokens(self) -> dict[str, str]:
        """Role -> token, as in {"bos_token": "<|begin_of_text|>"}."""
        return tokenizer_files.read_special_tokens(self.directory)

    @property
    def location(self) -> str:
        """What opens this checkpoint again, from another working directory and in another year."""
        if self.hub is not None:
            return f"{self.hub}{self.part}"
        return f"{self.directory if is_synthetic(self.directory) else self.directory.resolve()}{self.part}"

    @property
    def name(self) -> str:
        """What to call it: its repository, the directory's name, or `synthetic:…`."""
        return Path(self.location).name if self.hub is None else f"{self.hub.repository}{self.part}"

    @property
    def config_sha256(self) -> str:
        """Of the file `config_name`; a synthetic checkpoint has none, and its config itself is hashed."""
        if is_synthetic(self.directory):
            data = json.dumps(self.config.to_json(), sort_keys=True).encode()
        else:
            data = (self.directory / self.config_name).read_bytes()
        return hashlib.sha256(data).hexdigest()

    def _view(self, source: Source) -> Tensor:
        """What `Source` describes, as a view that may alias the file."""
        assert not source.interleave, "only `read_piece` interleaves"
        view = self.store.read_slice(source.tensor, self._where(source))
        return view.t() if source.transposed else view

    def _where(self, source: Source) -> tuple[int | slice, ...]:
        """`Source` in the axes of its tensor. A slice out of bounds is a mistake of ours."""
        shape = self.tensors[source.tensor].shape
        kept = shape if source.index is None else shape[1:]
        cuts = [cut for cut in (source.rows, source.columns) if cut]
        size = kept[::-1] if source.transposed else kept
        inside = len(cuts) == len(size) and all(0 <= a <= b <= n for (a, b), n in zip(cuts, size, strict=True))
        if not inside or (source.index is not None and not 0 <= source.index < shape[0]):
            raise AssertionError(f"{source} does not fit a tensor of shape {shape}")
        where: list[int | slice] = [slice(*cut) for cut in (cuts[::-1] if source.transposed else cuts)]
        if source.index is not None:
            where.insert(0, source.index)
        return tuple(where)


def alternating(gate: Any, up: Any, run: int) -> Any:
    """Two halves [rows, columns], or dicts of such, as one of runs of `run` rows that alternate."""
    if isinstance(gate, dict):
        return {name: alternating(gate[name], up[name], run) for name in gate}
    rows, columns = gate.shape
    both = np.empty((rows // run, 2, run, columns), gate.dtype)
    for i, half in enumerate((gate, up)):
        both[:, i] = half.reshape(rows // run, run, columns)
    return both.reshape(2 * rows, columns)


def _refuse_non_finite(values: NDArray[np.float32], source: Source) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    at = np.unravel_index(int(np.argmin(finite)), values.shape)
    cuts = zip(("row", "column"), (source.rows, source.columns), at, strict=False)
    words = [f"{axis} {cut[0] + int(i)}" for axis, cut, i in cuts if cut]
    expert = [] if source.index is None else [f"expert {source.index}"]
    raise InputError(
        f"tensor {source.tensor} holds {values[at]} ({', '.join(expert + words)}) and {(~finite).sum()} numbers in all "
        "that are not finite; expected finite weights. The checkpoint is damaged: download it again."
    )
