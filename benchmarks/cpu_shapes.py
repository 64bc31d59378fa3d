"""The models of the CPU benchmark, each written twice: as bundles of corral's and as GGUF files that llama.cpp quantizes.

`wide` is four layers of Scout at full width, `half` a mixture of experts of 0.5 B parameters, `demo` the checkpoint that
the project ships. The first two are synthetic: GGUF files are written tensor by tensor from the same weights, in
bfloat16, and llama.cpp's own tool quantizes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_peer import Peer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from corral.graphs import compile
from corral.graphs.quantize.rtn import rtn
from corral.kernels import find_library
from corral.model.checkpoint import open_checkpoint
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING, HEAD, expected_parameters
from corral.model.checkpoint.synthetic import open_synthetic
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.model_config import ModelConfig
from corral.spec.presets import SCALED_ROPE, Preset
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import Source

HALF = Preset(
    name="half",
    title="a mixture of experts of 0.5 B parameters",
    config={
        "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 1024, "intermediate_size_mlp": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_scaling": SCALED_ROPE,
        "bos_token_id": 0, "eos_token_id": [1, 2],
    },
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How corral's int4 is made: in the widest groups and by the fastest method whose KL is no worse than Q4_0's."""

    checkpoint: str
    group_size: int
    method: str
    text: Path | None = None  # on which KL is measured; without: on random tokens, which mean as much to random weights


DEMO = Path(__file__).parents[1] / "demo/demo-scout"
SHAPES = {
    "wide": Shape("synthetic:scout?layers=4", 64, "rtn-mse"),
    "half": Shape("", 64, "rtn-mse"),  # written into the benchmark's directory
    "demo": Shape(str(DEMO), 128, "gptq", DEMO / "heldout.txt"),
}
# Ours -> GGUF's, with whatever comes before and after kept apart: "layers.3." becomes "blk.3.".
GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    EMBEDDING: "token_embd.weight",
    "norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
IN_FLOAT32 = ("norm", "ffn_gate_inp")  # what llama.cpp keeps in float32 whatever the file type
SAME_VALUES, SAME_GROUP = "same-values", 32  # Q4_0 with corral's own codes and scales; its groups
KL_TOKENS = 2048
BLOCK_BYTES = {"F32": 128, "BF16": 64, "Q4_0": 18}  # of 32 numbers in a GGUF file


def checkpoint_of(shape: str, directory: Path) -> str:
    """Where `open_checkpoint` finds a shape's weights; those of `half` are written first."""
    if SHAPES[shape].checkpoint:
        return SHAPES[shape].checkpoint
    from safetensors.torch import save_file

    where = directory / shape
    if not (where / "model.safetensors").exists():
        where.mkdir(parents=True, exist_ok=True)
        store = open_synthetic(HALF, shape)
        (where / "config.json").write_text(json.dumps(HALF.config_json))
        save_file(
            {name: store.read_slice(name, ()).contiguous() for name in store.tensors}, where / "model.safetensors"
        )
    return str(where)


def bundle_of(checkpoint: str, directory: Path, kernels: str, group_size: int, method: str) -> Path:
    """An int4 bundle, compiled unless it is there."""
    out = directory / f"{kernels}-g{group_size}-{method}"
    if not (out / "manifest.json").exists():
        compile(checkpoint, out, Recipe(weights="int4", group_size=group_size, kernels=kernels, method=method))
    return out


def windows_of(checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """Token ids of some windows, each within a chunk that llama.cpp has, too."""
    model = checkpoint.config
    size = min(512, model.attention_chunk_size or 512) - 1
    count = KL_TOKENS // size
    if text is None:
        ids = np.random.default_rng(2).integers(0, model.vocab_size, count * size).tolist()
    else:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None
        ids = Tokenizer.from_buffer(tokenizer).encode(text.read_text(), add_special_tokens=False).ids[: count * size]
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def demo_bundle(work: Path) -> Path:
    """The demo as its speed is measured."""
    shape = SHAPES["demo"]
    return bundle_of(shape.checkpoint, work / "demo", "corral", shape.group_size, shape.method)


def gguf_of(checkpoint: str, directory: Path, peer: Peer, kind: str) -> Path:
    """The same weights as a GGUF file of `kind` (Q4_0, Q4_K_M, … or SAME_VALUES), made unless it is there."""
    out, whole = directory / f"{kind}.gguf", directory / "BF16.gguf"
    if out.exists():
        return out
    directory.mkdir(parents=True, exist_ok=True)
    if kind == SAME_VALUES:
        write_gguf(open_checkpoint(checkpoint), out, peer, matrices="Q4_0")
        return out
    if not whole.exists():
        write_gguf(open_checkpoint(checkpoint), whole, peer)
    return peer.quantize(whole, out, kind)


def touched_bytes(bundle: Bundle) -> int:
    """Bytes of weights that one token reads: of the experts the chosen ones, of the embedding a row."""
    model, total = bundle.manifest.model, 0.0
    for record in bundle.manifest.coverage:
        share = {"experts": model.num_experts_per_tok / max(model.num_local_experts, 1), "embedding": 0}
        total += record.bytes * share.get(record.kind, 1)
    return int(total)


def gguf_bytes_per_token(path: Path, peer: Peer) -> int:
    """The same of a GGUF file."""
    gguf = peer.gguf()
    reader = gguf.GGUFReader(path)
    experts, used = (int(reader.fields[f"llama4.{key}"].contents()) for key in ("expert_count", "expert_used_count"))
    shares = {"token_embd.weight": 0.0, "exps.weight": used / experts}
    return int(
        sum(
            tensor.n_bytes * next((s for end, s in shares.items() if tensor.name.endswith(end)), 1.0)
            for tensor in reader.tensors
        )
    )


def write_gguf(checkpoint: Checkpoint, out: Path, peer: Peer, matrices: str = "BF16") -> None:
    """Write a decoder as GGUF, a tensor at a time: at most one layer's experts are in memory.

    Matrices in bfloat16, or, but for the embedding, in Q4_0 with the codes and scales of corral's int4 in groups of 32.
    """
    gguf, config = peer.gguf(), checkpoint.config
    writer = gguf.GGUFWriter(str(out.with_suffix(".part")), "llama4")
    _write_config(writer, config, gguf)
    tensors = [(*tensor, _form(tensor[0], matrices)) for tensor in _names(config)]
    for name, shape, _, form in tensors:
        kind = getattr(gguf.GGMLQuantizationType, form)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // 32 * BLOCK_BYTES[form], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, parameter, form in tensors:
        bits = _bits(checkpoint, name, parameter).reshape(shape)
        if form == "BF16":
            writer.write_tensor_data(bits)
        elif form == "F32":
            writer.write_tensor_data(_floats(bits))
        else:
            rows = bits.reshape(-1, *shape[-2:])  # an expert at a time
            writer.write_tensor_data(np.concatenate([_q4_0(_floats(part)) for part in rows]))
    writer.close()
    out.with_suffix(".part").rename(out)


def _form(name: str, matrices: str) -> str:
    if any(word in name for word in IN_FLOAT32):
        return "F32"
    return "BF16" if name == GGUF_NAMES[EMBEDDING] else matrices


def _floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _q4_0(weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks of 32 numbers: a scale in fp16, then the codes, the first sixteen in the low halves of bytes."""
    found = rtn(weight, bits=4, group_size=SAME_GROUP)
    low, high = found["codes"].reshape(-1, 2, 16).swapaxes(0, 1)
    scales = found["scales"].astype(np.float16).reshape(-1, 1).view(np.uint8)
    return np.concatenate([scales, low | high << 4], axis=1)


def _write_config(writer: Any, config: ModelConfig, gguf: Any) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(1)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")


def _names(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """GGUF's name, shape and our parameter, of every tensor."""
    for parameter, shape in expected_parameters(config).items():
        layer, own = "", parameter
        if parameter.startswith("layers."):
            _, number, own = parameter.split(".", 2)
            layer = f"blk.{number}."
        if own == "feed_forward.experts.gate_up_proj":
            experts, hidden, width = shape
            for half in ("gate", "up"):
                yield f"{layer}ffn_{half}_exps.weight", (experts, width // 2, hidden), parameter
        elif own == "feed_forward.experts.down_proj":
            yield layer + GGUF_NAMES[own], (shape[0], shape[2], shape[1]), parameter
        else:
            yield layer + GGUF_NAMES[own], shape, parameter


def _bits(checkpoint: Checkpoint, name: str, parameter: str) -> NDArray[np.uint16]:
    """A tensor's bfloat16 numbers, as bits, outputs by inputs."""
    shape, tensor = checkpoint.info(parameter).shape, checkpoint.source(parameter)

    def read(source: Source) -> NDArray[np.uint16]:
        values: NDArray[np.uint16] = checkpoint.read_raw(source).astype(np.uint16, copy=False)
        return values

    if len(shape) == 1:
        return read(Source(tensor, (0, shape[0])))
    if len(shape) == 2:
        return read(Source(tensor, (0, shape[0]), (0, shape[1])))
    experts, inputs, outputs = shape
    rows = {"gate": (0, outputs // 2), "up": (outputs // 2, outputs)}.get(name.split("_")[1], (0, outputs))
    whole = np.empty((experts, rows[1] - rows[0], inputs), np.uint16)
    for expert in range(experts):
        whole[expert] = read(Source(tensor, rows, (0, inputs), index=expert, transposed=True))
    return whole


def experts_visited(bundle: Path) -> tuple[int, int] | None:
    """(fewest experts that 512 random tokens visit in a layer, all experts) of a bundle with corral's kernels; None without
    experts."""
    import onnx

    manifest = open_bundle(bundle, verify=False).manifest
    experts = manifest.model.num_local_experts
    graph = bundle / manifest.graphs[0].path
    model = onnx.load(graph, load_external_data=False)
    routers = [node.output[0] for node in model.graph.node if node.op_type == "MatMul" and "router" in node.name]
    if not routers:
        return None
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in routers)
    changed = graph.with_name("routers.onnx")
    onnx.save(model, changed)
    try:
        logits = _first_stage(changed, manifest, bundle)
    finally:
        changed.unlink()
    return min(len(set(values.reshape(-1, experts).argmax(-1).tolist())) for values in logits), experts


def _first_stage(graph: Path, manifest: Any, bundle: Path) -> list[Any]:
    import onnxruntime

    from corral.runtime.embedding import EmbeddingTable

    tokens = min([512, *(layout.chunk for layout in manifest.kv if layout.chunk)])
    ids = np.random.default_rng(1).integers(0, manifest.model.vocab_size, tokens)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(find_library().path))
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "embeddings": EmbeddingTable(open_bundle(bundle, verify=False))(ids)[None],
        "positions": np.arange(tokens)[None],
        "logit_rows": np.arange(tokens)[None],  # all: the last layer routes no others
    }
    for layout in manifest.kv:
        shape = (1, layout.num_heads, layout.capacity(tokens), layout.head_dim)
        feeds[f"past_length.{layout.kv_class}"] = np.zeros(1, np.int64)
        for layer in layout.layers:
            feeds |= {f"past_{part}.{layer}": np.zeros(shape, np.float32) for part in ("key", "value")}
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in wanted})
