"""The ONNX Runtime session over a small hand-built graph: shared caches, batches, growth, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from corral.runtime import LLM, SamplingParams
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.spec import graph_io
from corral.spec.bundle import open_bundle
from corral.spec.errors import CorralError, InputError
from corral.spec.manifest import CoverageRecord, GraphRecord
from corral.spec.model_config import ModelConfig

HEADS, DIM = 2, 8  # key/value heads and their width: half of hidden, so that keys can be a slice of it


def toy_graph(config: ModelConfig, weights: dict[str, np.ndarray]) -> bytes:
    """A decoder without projections: per layer x += [attention(x, x, x) of the first half, 0]; then logits."""
    onnx = pytest.importorskip("onnx")
    h, f32, i64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    cache = ["batch", HEADS, "rows", DIM]
    inputs = [
        h.make_tensor_value_info(graph_io.EMBEDDINGS, f32, ["batch", "tokens", config.hidden_size]),
        h.make_tensor_value_info(graph_io.POSITIONS, i64, ["batch", "tokens"]),
        h.make_tensor_value_info(graph_io.LOGIT_ROWS, i64, ["batch", "logit_rows"]),
        *(h.make_tensor_value_info(graph_io.past_length(c), i64, ["batch"]) for c in config.kv_classes),
    ]
    outputs = [h.make_tensor_value_info(graph_io.LOGITS, f32, ["batch", "logit_rows", config.vocab_size])]
    nodes = [
        h.make_node("Cast", ["positions"], ["position_f"], to=f32),
        h.make_node("Unsqueeze", ["position_f", "minus_one"], ["position_column"]),
        h.make_node("Mul", ["position_column", "slope"], ["position_rows"]),
        h.make_node("Add", ["embeddings", "position_rows"], ["x0"]),
        h.make_node("Shape", ["positions"], ["num_tokens"], start=1, end=2),
    ]
    for i, layer in enumerate(config.layers):
        length = graph_io.past_length(layer.kv_class)
        for kind, name in (("key", graph_io.past_key), ("value", graph_io.past_value)):
            inputs.append(h.make_tensor_value_info(name(i), f32, [*cache[:2], f"rows_{layer.kv_class}", DIM]))
            out = (graph_io.present_key if kind == "key" else graph_io.present_value)(i)
            outputs.append(h.make_tensor_value_info(out, f32, [*cache[:2], f"rows_{layer.kv_class}", DIM]))
            nodes.append(h.make_node("TensorScatter", [name(i), f"heads{i}", length], [out], axis=2))
        nodes[-2:-2] = [
            h.make_node("Slice", [f"x{i}", "zero", "half", "minus_one"], [f"half{i}"]),
            h.make_node("Reshape", [f"half{i}", "split"], [f"split{i}"]),
            h.make_node("Transpose", [f"split{i}"], [f"heads{i}"], perm=[0, 2, 1, 3]),
        ]
        nodes += [
            h.make_node("Add", [length, "num_tokens"], [f"filled{i}"]),
            h.make_node(
                "Attention",
                [f"heads{i}", graph_io.present_key(i), graph_io.present_value(i), f"mask{i}"],
                [f"attended{i}"],
            ),
            h.make_node("Transpose", [f"attended{i}"], [f"back{i}"], perm=[0, 2, 1, 3]),
            h.make_node("Reshape", [f"back{i}", "join"], [f"joined{i}"]),
            h.make_node("Concat", [f"joined{i}", f"joined{i}"], [f"wide{i}"], axis=-1),
            h.make_node("Add", [f"x{i}", f"wide{i}"], [f"x{i + 1}"]),
        ]
        # mask[b, 0, s, c] = c <= past_length[b] + s
        at = next(n for n, node in enumerate(nodes) if node.op_type == "Attention" and node.output[0] == f"attended{i}")
        nodes[at:at] = [
            h.make_node("Shape", [graph_io.past_key(i)], [f"capacity{i}"], start=2, end=3),
            h.make_node("Squeeze", [f"capacity{i}"], [f"capacity_scalar{i}"]),
            h.make_node("Range", ["i0", f"capacity_scalar{i}", "i1"], [f"rows{i}"]),
            h.make_node("Squeeze", ["num_tokens"], [f"tokens_scalar{i}"]),
            h.make_node("Range", ["i0", f"tokens_scalar{i}", "i1"], [f"steps{i}"]),
            h.make_node("Unsqueeze", [length, "minus_one"], [f"length_column{i}"]),
            h.make_node("Add", [f"length_column{i}", f"steps{i}"], [f"last{i}"]),
            h.make_node("Unsqueeze", [f"last{i}", "mask_axes"], [f"last4{i}"]),
            h.make_node("LessOrEqual", [f"rows{i}", f"last4{i}"], [f"mask{i}"]),
        ]
    end = len(config.layers)
    nodes += [
        h.make_node("Unsqueeze", ["logit_rows", "minus_one"], ["row_index"]),
        h.make_node("GatherND", [f"x{end}", "row_index"], ["picked"], batch_dims=1),
        h.make_node("MatMul", ["picked", "head"], ["logits"]),
    ]
    constants = {
        "minus_one": np.array([-1]), "zero": np.array([0]), "half": np.array([HEADS * DIM]), "i0": np.array(0),
        "i1": np.array(1), "split": np.array([0, 0, HEADS, DIM]), "join": np.array([0, 0, HEADS * DIM]),
        "mask_axes": np.array([1, 3]), **weights,
    }  # fmt: skip
    graph = h.make_graph(
        nodes, "toy", inputs, outputs, [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def toy_logits(config: ModelConfig, weights: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The same decoder over a whole sequence, in float64."""
    count, x = len(rows), rows.astype(np.float64)
    position = np.arange(count)
    x = x + position[:, None] * weights["slope"]
    for layer in config.layers:
        heads = x[:, : HEADS * DIM].reshape(count, HEADS, DIM).transpose(1, 0, 2)
        scores = heads @ heads.transpose(0, 2, 1) / np.sqrt(DIM)
        visible = position[None] <= position[:, None]
        if layer.kv_class == "chunked":
            chunk = config.attention_chunk_size or count
            visible &= position[None] // chunk == position[:, None] // chunk
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (p / p.sum(-1, keepdims=True) @ heads).transpose(1, 0, 2).reshape(count, -1)
        x = x + np.concatenate([attended, attended], axis=-1)
    return x @ weights["head"]


@pytest.fixture(scope="module")
def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "head": rng.standard_normal((config.hidden_size, config.vocab_size), dtype=np.float32),
        "slope": rng.uniform(-0.01, 0.01, config.hidden_size).astype(np.float32),
    }


@pytest.fixture(scope="module")
def table(config: ModelConfig) -> np.ndarray:
    # Small, so that attention without projections and norms stays well conditioned.
    return np.random.default_rng(1).standard_normal((config.vocab_size, config.hidden_size), dtype=np.float32) / 4


@pytest.fixture
def toy(make_bundle: Any, config: ModelConfig, weights: dict[str, np.ndarray], table: np.ndarray) -> Any:
    return make_bundle(graph=toy_graph(config, weights), table=table)


def test_scores_through_shared_caches_equal_whole_sequences(
    toy: Any, config: ModelConfig, weights: dict[str, np.ndarray], table: np.ndarray
) -> None:
    ids = np.random.default_rng(2).integers(0, 264, 300)  # grows the global cache beyond its first 256 rows
    np.testing.assert_allclose(
        LLM(toy, threads=1).score(ids), toy_logits(config, weights, table[ids]), rtol=2e-4, atol=2e-4
    )


def test_batched_decoding_equals_each_prompt_alone(
    toy: Any, config: ModelConfig, weights: dict[str, np.ndarray], table: np.ndarray
) -> None:
    llm = LLM(toy, threads=1, max_batch=3)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in (20, 3, 11, 9, 14)]
    prompts = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (1, 5, 8, 13, 40)]
    for completion, wanted in zip(llm.generate(prompts, params), params, strict=True):
        ids = np.array(completion.prompt_token_ids + completion.token_ids)
        expected = toy_logits(config, weights, table[ids]).argmax(-1)
        assert completion.token_ids == tuple(expected[len(completion.prompt_token_ids) - 1 : -1].tolist())
        assert len(completion.token_ids) == wanted.max_tokens


def test_a_graph_with_other_inputs_is_refused(make_bundle: Any, config: ModelConfig, weights: Any) -> None:
    graph = toy_graph(config, weights).replace(b"past_key.2", b"past_kex.2")
    with pytest.raises(InputError, match=r"lacks \['past_key.2'\], has also \['past_kex.2'\]"):
        LLM(make_bundle(graph=graph))


@pytest.mark.parametrize("ranges", [((0, 1), (2, 3)), ((0, 2),), ((0, 2), (1, 3)), ((1, 3),), ((0, 3), (3, 3)), ()])
def test_graphs_that_are_not_all_layers_in_order_are_refused(make_bundle: Any, ranges: Any) -> None:
    graphs = tuple(GraphRecord(path="decoder.onnx", first_layer=i, end_layer=j) for i, j in ranges)
    with pytest.raises(InputError, match="expected ranges that follow each other from 0 to 3"):
        LLM(make_bundle(graphs=graphs))


def test_a_bundle_larger_than_memory_runs_from_the_file_and_says_so(
    make_bundle: Any,
    config: ModelConfig,
    weights: Any,
    table: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    coverage = (CoverageRecord(kind="experts", stored="float32", matrices=1, parameters=1, bytes=3_000_000_000),)
    monkeypatch.setattr("corral.runtime.onnxruntime_session.usable_memory", lambda: 2_000_000_000)
    llm = LLM(make_bundle(graph=toy_graph(config, weights), table=table, coverage=coverage), threads=1)
    assert "has 3.0 GB of weights, and 2.0 GB of memory are free: they stay in the file" in caplog.text
    ids = np.arange(20)
    np.testing.assert_allclose(llm.score(ids), toy_logits(config, weights, table[ids]), rtol=2e-4, atol=2e-4)


def test_an_unknown_provider_and_impossible_threads_are_refused(toy: Any) -> None:
    with pytest.raises(InputError, match="provider is 'tpu', expected cpu for this bundle"):
        LLM(toy, provider="tpu")
    with pytest.raises(InputError, match="threads is 0"):
        LLM(toy, threads=0)


def test_what_onnx_runtime_says_while_running_becomes_a_corral_error(toy: Any) -> None:
    llm = LLM(toy, threads=1)
    llm._engine._embed = lambda ids: np.zeros((len(ids), 7), dtype=np.float32)
    with pytest.raises(CorralError, match=r"failed to run .*decoder\.onnx"):
        llm.generate([[1, 2]])


def test_a_session_lets_go_of_caches(toy: Any) -> None:
    session = OnnxRuntimeSession(open_bundle(toy), threads=1)
    llm = LLM(toy, session=session)
    llm.generate([[1, 2]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert session._graphs[0]._bound is None
    assert session._graphs[0]._binding is None
