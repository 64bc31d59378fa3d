"""A tiny random Llama 4 behind the runtime: bundle directories, and the PyTorch reference as a Session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from corral.runtime.embedding import STORED
from corral.runtime.kv_cache import KvCache
from corral.runtime.session import Step
from corral.spec.kv_layout import kv_layouts
from corral.spec.manifest import FileRecord, GraphRecord, Manifest, TensorRecord
from corral.spec.model_config import ModelConfig, parse_config
from corral.spec.recipe import Recipe

CHUNK = 8
BOS, EOS, HEADER_START, HEADER_END = 256, 257, 258, 259
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|header_start|>{{ message['role'] }}<|header_end|>\n\n{% if message['content'] is string %}\n"
    "{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}\n{{ part['text'] | trim }}"
    "{% endfor %}{% endif %}<|eot|>{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|header_start|>assistant<|header_end|>\n\n{% endif %}\n"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Layers rope, nope, rope; chunks of 8 tokens; the temperature rises every 4."""
    return parse_config(
        {
            "model_type": "llama4_text",
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 32,
            "intermediate_size_mlp": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": CHUNK,
            "floor_scale": 4,
            "max_position_embeddings": 2048,
            "eos_token_id": [EOS],
        }
    )


@pytest.fixture(scope="session")
def model(config: ModelConfig) -> Any:
    """The reference model with weights wide enough that greedy texts differ."""
    torch = pytest.importorskip("torch")
    from corral.model.text import Llama4Text

    torch.set_num_threads(1)  # at this size, threads that wait for each other only cost time

    generator = torch.Generator().manual_seed(1)
    model = Llama4Text(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


class TorchSession:
    """The reference model as a Session, over the caches it is given. Remembers the shape of every step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes: list[tuple[int, int]] = []
        self.fail_at: int | None = None

    def run(self, step: Step) -> np.ndarray:
        import torch

        from corral.model.text import Past

        self.shapes.append(step.positions_BS.shape)
        if self.fail_at is not None and len(self.shapes) > self.fail_at:
            raise RuntimeError("the session broke")
        keys, values = ([torch.from_numpy(a) for a in arrays] for arrays in (step.caches.keys, step.caches.values))
        lengths = {kv_class: torch.from_numpy(length) for kv_class, length in step.past_length_B.items()}
        with torch.no_grad():
            logits, new_keys, new_values = self.model(
                torch.from_numpy(step.embeddings_BSH),
                torch.from_numpy(step.positions_BS),
                torch.from_numpy(step.logit_rows_BR),
                Past(keys, values, lengths),
            )
            for past, present in zip(keys + values, new_keys + new_values, strict=True):
                past.copy_(present)
        return logits.numpy()

    def new_caches(self, layouts: Any, max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def release(self) -> None:
        pass


@pytest.fixture
def session(model: Any) -> TorchSession:
    return TorchSession(model)


@pytest.fixture
def embed(model: Any) -> Callable[[Any], np.ndarray]:
    table = model.embed_tokens.weight.detach().numpy()
    return lambda ids: table[np.asarray(ids)]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """Ids 0 to 255 are the letters of the byte alphabet, then the special tokens; BOS is added in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A", special_tokens=[(SPECIAL_TOKENS[0], BOS)]
    )
    return tokenizer.to_str()


MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tmp_path: Path, config: ModelConfig, tokenizer_json: str) -> MakeBundle:
    """`make_bundle(tokenizer=False, **manifest fields)` -> a bundle directory with a zero embedding table."""

    def make(
        name: str = "bundle",
        *,
        table: np.ndarray | None = None,
        table_dtype: str = "float32",
        graph: bytes = b"no graph",
        tokenizer: bool = True,
        **changes: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        model: ModelConfig = changes.get("model", config)
        shape = (model.vocab_size, model.hidden_size)
        table = np.zeros(shape, STORED[table_dtype]) if table is None else table
        files = {"embedding.bin": b"\0" * 64 + table.tobytes(), "decoder.onnx": graph}
        if tokenizer:
            files |= {"tokenizer.json": tokenizer_json.encode(), "chat_template.jinja": CHAT_TEMPLATE.encode()}
        for path, data in files.items():
            (directory / path).write_bytes(data)
        fields: dict[str, Any] = {
            "format": "1.0",
            "corral": "0.1.0",
            "stage": "ready",
            "model": model,
            "recipe": Recipe(target="portable", weights="fp32"),
            "requires": {"onnxruntime": "1.31"},
            "source": {"kind": "test"},
            "graphs": (GraphRecord(path="decoder.onnx", first_layer=0, end_layer=model.num_layers),),
            "kv": kv_layouts(model),
            "embedding": TensorRecord(path="embedding.bin", dtype=table_dtype, shape=shape, offset=64),
            "coverage": (),
            "tokenizer": "tokenizer.json" if tokenizer else None,
            "chat_template": "chat_template.jinja" if tokenizer else None,
            "special_tokens": {"bos_token": SPECIAL_TOKENS[0]},
            "files": tuple(
                FileRecord(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for path, data in files.items()
            ),
        }
        (directory / "manifest.json").write_text(Manifest(**{**fields, **changes}).dumps())
        return directory

    return make


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to the manifest's JSON."""
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
