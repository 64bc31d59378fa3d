"""Bundle -> tokens, with numpy, onnxruntime, tokenizers and jinja2 only: `LLM`, `SamplingParams` and what they return.

Nothing heavy is imported before it is used: `import corral.runtime` costs no more than this file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corral.runtime.completion import Completion, Piece, Timings, TokenLogprobs
    from corral.runtime.llm import LLM
    from corral.runtime.sampling_params import SamplingParams
    from corral.runtime.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Piece", "SamplingParams", "Timings", "TokenLogprobs", "Tokenizer"]


def __getattr__(name: str) -> Any:
    modules = {"LLM": "llm", "SamplingParams": "sampling_params", "Tokenizer": "tokenizer"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{modules.get(name, 'completion')}"), name)
