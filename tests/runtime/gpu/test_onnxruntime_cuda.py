"""The CUDA target without a GPU: its graphs on the CPU provider's 16-bit kernels, its session over a stand-in device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import corral.runtime.gpu.onnxruntime_cuda_session as cuda_session
from corral.runtime import LLM, SamplingParams
from corral.runtime.gpu.onnxruntime_cuda_session import OnnxRuntimeCudaSession
from corral.runtime.onnxruntime_session import OnnxRuntimeSession
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import EnvironmentProblem

Install = Callable[..., Any]
TinyBundle = Callable[[str, str, str], Path]

CONTEXT = 64
# Of the logits' scale. float16 has 11 bits; both sides have the same int4 weights.
TOLERANCE = 3e-3
# What onnxruntime-gpu 1.31.1 has CUDA kernels for, of what the graphs hold: docs/cuda.md tells how that was found.
ON_CUDA = {
    "": "Add Cast CastLike Concat Cos Div Equal Expand Floor Gather GatherND Log MatMul Mul RMSNormalization Reshape "
    "RotaryEmbedding Shape Sigmoid Sin Split TopK Unsqueeze",
    "com.microsoft": "GroupQueryAttention MatMulNBits QMoE",
}
# Lengths of caches: a few integers, which CUDA's kernels want on the host.
ON_CPU = ["Sub", "ReduceMax"]


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def logprobs(llm: LLM, prompt: list[int]) -> list[float]:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)
    return [token.logprob for token in llm.generate([prompt], params)[0].logprobs or ()]


def opened(bundle: Bundle, device: Any) -> LLM:
    session = OnnxRuntimeCudaSession(bundle, threads=1, open_device=lambda: device, provider="cpu")
    return LLM(bundle, session=session, max_context=CONTEXT)


@pytest.mark.parametrize("form", ["scout", "maverick", "topk2"])
def test_scores_are_those_of_the_portable_graph(form: str, tiny_bundle: TinyBundle, install: Install) -> None:
    """Over three chunks and a bit: caches start again, and are never where ONNX Runtime put them by itself."""
    text = ids(3 * 16 + 5, seed=1)  # without a token whose experts are so near to each other that rounding decides
    got = opened(open_bundle(tiny_bundle(form, "cuda", "int4")), install()).score(text)
    want = LLM(tiny_bundle(form, "portable", "int4")).score(text)
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_sequences_that_decode_together_equal_each_alone(tiny_bundle: TinyBundle, install: Install) -> None:
    """They end at different times, so that slots move on the device and the batch shrinks."""
    bundle = open_bundle(tiny_bundle("scout", "cuda", "int4"))
    prompts = [ids(count, seed=count) for count in (3, 17, 31)]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (25, 4, 11)]
    device = install()
    llm = opened(bundle, device)
    together = [completion.token_ids for completion in llm.generate(prompts, params)]
    alone = [opened(bundle, install()).generate([p], one)[0].token_ids for p, one in zip(prompts, params, strict=True)]
    assert together == alone


def test_caches_lie_where_the_device_says(tiny_bundle: TinyBundle, install: Install) -> None:
    """A session of ONNX Runtime's own over the same graph, with caches in this process's arrays, gives the same."""
    bundle, device = open_bundle(tiny_bundle("scout", "cuda", "int4")), install()
    llm = opened(bundle, device)
    used_of: list[int] = []
    wait = device.wait

    def look() -> None:
        wait()
        used_of.append(sum(bool(block.any()) for block in device.memory.values()))

    device.wait = look
    kept = Bundle(bundle.directory, dataclasses.replace(bundle.manifest, requires={"onnxruntime": "1.31"}))
    want = LLM(kept, session=OnnxRuntimeSession(kept, threads=1), max_context=CONTEXT)
    np.testing.assert_allclose(logprobs(llm, ids(20)), logprobs(want, ids(20)), atol=5e-3)
    assert used_of[-1] == 2 * bundle.manifest.model.num_layers  # keys and values of each layer, none elsewhere


def test_every_operator_has_a_cuda_kernel_and_experts_are_stored_as_written(tiny_bundle: TinyBundle) -> None:
    for form in ("scout", "maverick", "topk2"):
        graph = onnx.load(tiny_bundle(form, "cuda", "int4") / "decoder.onnx", load_external_data=False).graph
        assert {
            (n.domain, n.op_type) for n in graph.node if n.op_type not in ON_CUDA[n.domain].split() + ON_CPU
        } == set()
        for node in graph.node:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            if node.op_type == "QMoE":
                assert attributes["weights_prepacked"] == 0
            if node.op_type in ("QMoE", "MatMulNBits"):
                assert attributes["accuracy_level"] == 0
        scales = [tensor for tensor in graph.initializer if tensor.name.endswith(".scales")]
        assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in scales} == {"FLOAT16"}


def test_experts_are_chosen_in_float32(tiny_bundle: TinyBundle) -> None:
    """What QMoE is given to route by is one-hot, so that two logits that are equal in float16 are no tie."""
    graph = onnx.load(tiny_bundle("scout", "cuda", "int4") / "decoder.onnx", load_external_data=False).graph
    by_output = {name: node for node in graph.node for name in node.output}
    chosen = []
    for node in graph.node:
        if node.op_type == "QMoE":
            routing = by_output[node.input[1]]
            while routing.op_type != "TopK":
                routing = by_output[routing.input[0]]
            chosen.append(by_output[routing.input[0]])
    assert len(chosen) == 5
    assert {node.op_type for node in chosen} == {"MatMul"}  # the router's product itself, with no Cast between


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_remedy_is_said(tiny_bundle: TinyBundle) -> None:
    with pytest.raises(EnvironmentProblem, match=r"finds no NVIDIA GPU.*--target cpu"):
        LLM(tiny_bundle("scout", "cuda", "int4"))


def test_without_its_package_the_pip_lines_are_said(tiny_bundle: TinyBundle, install: Install) -> None:
    bundle = open_bundle(tiny_bundle("scout", "cuda", "int4"))
    with pytest.raises(
        EnvironmentProblem, match=r"no CUDA provider\. Run `pip uninstall onnxruntime`, then `pip install"
    ):
        OnnxRuntimeCudaSession(bundle, open_device=install)


def test_a_provider_that_does_not_start_is_no_cpu_fallback(
    tiny_bundle: TinyBundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself goes on with the CPU, and says so in a log only."""
    import onnxruntime

    bundle = open_bundle(tiny_bundle("scout", "cuda", "int4"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(cuda_session, "check_requirements", lambda requires: None)
    with pytest.raises(EnvironmentProblem, match="did not start its CUDA provider and would run on CPUExecution"):
        OnnxRuntimeCudaSession(bundle, open_device=install)
