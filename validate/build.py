"""What can be compared: a checkpoint (the PyTorch model, the definition of right) or a bundle, behind one face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corral.spec.errors import InputError
from corral.spec.manifest import MANIFEST_NAME
from corral.spec.meta_params import PARAMS_NAME
from corral.spec.model_config import ModelConfig
from corral.spec.presets import SYNTHETIC
from corral.spec.progress import Progress, silent

Logits = NDArray[np.float32]  # [tokens, vocab]
CONFIG_NAMES = ("config.json", PARAMS_NAME)  # of Hugging Face's and of Meta's form


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed generation: seconds to the first token, tokens per second after it, seconds from each to the next."""

    time_to_first_token: float
    tokens_per_second: float
    between_tokens: tuple[float, ...] = ()


class Build(Protocol):
    """One form of the model: what it is called, how large it is, and what it says about the next token."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...  # "checkpoint" or "bundle"
    @property
    def bytes(self) -> int: ...
    @property
    def config(self) -> ModelConfig: ...

    def encode(self, text: str) -> list[int] | None:
        """Token ids of a text; None where the build has no tokenizer."""

    def logits(self, token_ids: Sequence[int]) -> Iterator[Logits]:
        """Teacher-forced logits of every token, float32, in blocks of any number of rows."""

    def time_decode(self, token_ids: Sequence[int], count: int) -> Run | None:
        """Generate `count` tokens greedily; None where speed says nothing."""

    def continue_greedily(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The `count` likeliest tokens after each of the prompts, which are all of one length."""


class BundleBuild:
    """A bundle, run as its users run it."""

    kind = "bundle"

    def __init__(self, path: Path, *, provider: str, threads: int | None, progress: Progress) -> None:
        from corral.runtime import LLM

        self._llm = LLM(path, provider=provider, threads=threads, progress=progress)
        manifest = self._llm.bundle.manifest
        self.name = path.resolve().name
        self.bytes = manifest.bytes
        self.config = manifest.model

    def encode(self, text: str) -> list[int] | None:
        tokenizer = self._llm.tokenizer
        return None if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)

    def logits(self, token_ids: Sequence[int]) -> Iterator[Logits]:
        return self._llm.score_pieces(list(token_ids))

    def time_decode(self, token_ids: Sequence[int], count: int) -> Run | None:
        from corral.runtime import SamplingParams

        # The end of a text must not end a measurement: every run decodes the same number of tokens.
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        timings = self._llm.generate([list(token_ids)], params)[0].timings
        return Run(
            time_to_first_token=timings.first_token,
            tokens_per_second=1 / timings.per_token,
            between_tokens=timings.between_tokens,
        )

    def continue_greedily(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        from corral.runtime import SamplingParams

        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        return [list(found.token_ids) for found in self._llm.generate([list(p) for p in prompts], params)]


class CheckpointBuild:
    """A checkpoint, run by the reference model in PyTorch; its speed is nobody's concern."""

    kind = "checkpoint"

    def __init__(self, path: Path, *, threads: int | None, progress: Progress = silent) -> None:
        import torch

        from corral.model.checkpoint import load_reference, open_checkpoint

        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = open_checkpoint(path, progress=progress)
        self.name = checkpoint.name
        self.config = checkpoint.config
        files = {file for tensor in checkpoint.tensors.values() for file in tensor.files}
        self.bytes = sum(file.stat().st_size for file in files if file.exists())  # synthetic ones have none
        self._tokenizer = checkpoint.tokenizer()
        self._model = load_reference(checkpoint)

    def encode(self, text: str) -> list[int] | None:
        if self._tokenizer is None:
            return None
        from tokenizers import Tokenizer

        return list(Tokenizer.from_buffer(self._tokenizer).encode(text, add_special_tokens=False).ids)

    def logits(self, token_ids: Sequence[int]) -> Iterator[Logits]:
        import torch

        with torch.inference_mode():
            block: Any = self._model.logits(torch.tensor([list(token_ids)]))[0].float().numpy()
        yield block

    def time_decode(self, token_ids: Sequence[int], count: int) -> Run | None:
        return None

    def continue_greedily(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        import torch

        ids, length = torch.tensor([list(prompt) for prompt in prompts]), len(prompts[0])
        with torch.inference_mode():
            for _ in range(count):  # without a cache: this model is the definition, not a runtime
                ids = torch.cat([ids, self._model.logits(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[:, length:].tolist()


def open_build(path: Path, *, provider: str, threads: int | None, progress: Progress = silent) -> Build:
    """Open a checkpoint or bundle directory. Raises InputError where it is neither."""
    if (path / MANIFEST_NAME).is_file():
        return BundleBuild(path, provider=provider, threads=threads, progress=progress)
    from corral.model.checkpoint.hub import hub_name
    from corral.model.checkpoint.part import split_part

    whole = Path(split_part(str(path))[0])
    if any((whole / name).is_file() for name in CONFIG_NAMES) or str(path).startswith(SYNTHETIC):
        return CheckpointBuild(path, threads=threads, progress=progress)
    if hub_name(whole) is not None:
        return CheckpointBuild(path, threads=threads, progress=progress)
    found = "does not exist" if not path.exists() else f"holds neither {MANIFEST_NAME} nor {CONFIG_NAMES[0]}"
    raise InputError(
        f"{path} {found}; expected a bundle or a checkpoint directory. Make a bundle with "
        "`corral compile CHECKPOINT -o OUT`."
    )
