"""FP8: the graph that TensorRT is given, run by ONNX Runtime, against PyTorch that rounds to the same FP8 numbers.

Two computations that differ in their last bits cannot be compared as they are: a value within float16's error of the
middle between two FP8 numbers becomes one or the other, 6 to 12 % apart. So PyTorch takes over the FP8 numbers that the
graph made. Each of them must be torch's own rounding of what the graph rounded, and that, within float16's error, what
PyTorch has at that place. So every product starts from equal numbers, and all that is ever between the two is float16's
error since the last product.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from corral.graphs import compile
from corral.graphs.compiler import lower
from corral.graphs.execute.job import plan_jobs, run_job
from corral.graphs.quantize import calibrate
from corral.graphs.quantize.calibrate import activation_ranges, largest_inputs
from corral.graphs.quantize.kinds import kind_of
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text
from corral.runtime import LLM
from corral.runtime.kv_cache import KvCache
from corral.runtime.session import Step
from corral.spec import graph_io
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.recipe import Recipe

DEMO = Path(__file__).parents[4] / "demo" / "demo-scout"
FP8 = Recipe(target="tensorrt-rtx", weights="fp8", max_context=128)
# Of the largest magnitude: inputs of products, some float16 operations after the product before (6e-4 to 1.6e-3 is seen,
# most after attention), and logits, which are a product and its gains rounded to float16 (ONNX Runtime does not round:
# 7e-7).
TOLERANCE, LOGITS_TOLERANCE = 4e-3, 2.0**-10
# Numbers near enough to the middle between two of FP8: float16's error by the distance of FP8 numbers. 0.3 to 0.5 % is seen.
FLIPS = 0.01
BASE = 2.0**-12
Checkpoint = Callable[[str], Path]
Lowered = Callable[[str], Path]


class Recording:
    """A session over the lowered graph that keeps what it rounds to FP8: name -> (before, after) for each step."""

    def __init__(self, bundle: Bundle) -> None:
        (record,) = bundle.manifest.graphs
        model = onnx.load(bundle.path(record.path), load_external_data=False)
        made = {name: node for node in model.graph.node for name in node.output}
        read_by = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        self.marked: dict[str, tuple[str, str]] = {}
        self.slots: dict[str, str] = {}  # of a layer's experts: the row of each visit
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                name = node.input[1].removesuffix(".range")
                self.marked[name] = (node.input[0], read_by[node.output[0]].output[0])
            elif node.op_type == "ScatterND":
                self.slots[node.name.removesuffix(".ScatterND")] = made[node.input[1]].input[0]
        wanted = {value for pair in self.marked.values() for value in pair} | set(self.slots.values())
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
        where = bundle.directory / "recording.onnx"  # beside the weights
        onnx.save(model, where)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # Higher levels of optimization make graphs with FP8 invalid in ONNX Runtime 1.31.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._session = ort.InferenceSession(str(where), options, providers=["CPUExecutionProvider"])
        where.unlink()
        self.steps: list[dict[str, np.ndarray]] = []

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> KvCache:
        return KvCache(layouts, max_context)

    def run(self, step: Step) -> np.ndarray:
        caches = {graph_io.past_key(i): (graph_io.present_key(i), a) for i, a in enumerate(step.caches.keys)}
        caches |= {graph_io.past_value(i): (graph_io.present_value(i), a) for i, a in enumerate(step.caches.values)}
        feeds: dict[str, Any] = {
            graph_io.EMBEDDINGS: step.embeddings_BSH,
            graph_io.POSITIONS: step.positions_BS,
            graph_io.LOGIT_ROWS: step.logit_rows_BR,
            **{graph_io.past_length(kv_class): rows for kv_class, rows in step.past_length_B.items()},
            **{past: array for past, (_, array) in caches.items()},
        }
        names = [output.name for output in self._session.get_outputs()]
        out = dict(zip(names, self._session.run(names, feeds), strict=True))
        for present, array in caches.values():
            array[...] = out[present]
        self.steps.append(out)
        return out[graph_io.LOGITS]

    def release(self) -> None: ...

    def rounded(self, name: str) -> tuple[Tensor, Tensor]:
        """What was rounded at `name`, before and after, [tokens, inputs]; of experts one row a visit."""
        experts, _, which = name.rpartition(".")
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for out in self.steps:
            for i, value in enumerate(self.marked[name]):
                rows = torch.from_numpy(out[value].astype(np.float32)).flatten(0, -2)
                if which in (calibrate.INPUT, calibrate.ACTIVATED):
                    rows = rows[torch.from_numpy(out[self.slots[experts]].astype(np.int64))]
                parts[i].append(rows)
        return torch.cat(parts[0]), torch.cat(parts[1])


def rounded(x: Tensor, scale: float | Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def per_output(matrix: Tensor) -> Tensor:
    """[outputs, inputs], each output scaled by its own largest magnitude; the scale's gain is a float16 number."""
    scale = matrix.abs().amax(-1, keepdim=True) / 448
    codes = (matrix / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return codes * (scale / BASE).half().float() * BASE


class Following:
    """Puts the graph's FP8 numbers into PyTorch, and checks each on its way."""

    def __init__(self, recording: Recording, ranges: dict[str, float]) -> None:
        self.recording, self.ranges = recording, ranges
        self.flips = self.count = 0

    def follow(self, name: str, x: Tensor) -> Tensor:
        """x [..., inputs] of PyTorch -> what the graph rounded it to."""
        before, after = self.recording.rounded(name)
        own, scale = x.flatten(0, -2), float(np.float16(max(self.ranges[name], 1e-3) / 448))
        assert (before - own).abs().max() < TOLERANCE * own.abs().max(), name
        # ONNX Runtime gives codes times scale in float16: the codes are those nearest to it.
        codes = (after / scale).to(torch.float8_e4m3fn).float()
        assert (after - codes * scale).abs().max() <= 2.0**-11 * after.abs().max(), name
        assert torch.equal(codes * scale, rounded(before, scale)), name
        self.flips += int((codes * scale != rounded(own, scale)).sum())
        self.count += codes.numel()
        return (codes * scale).view_as(x)

    def linear(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self.follow(name, *inputs),)

    def experts(self, module: Experts, name: str, x: Tensor, router_logits: Tensor) -> Tensor:
        """One visit after the other, in the order of the tokens."""
        logits, expert = router_logits.flatten(0, -2).topk(module.num_experts_per_tok, dim=-1)
        visits = x.flatten(0, -2)[:, None] * logits.sigmoid()[..., None]
        visits = self.follow(f"{name}.{calibrate.INPUT}", visits.flatten(0, 1))
        both = torch.stack([row @ module.gate_up_proj[e] for row, e in zip(visits, expert.flatten(), strict=True)])
        gate, up = both.chunk(2, dim=-1)
        activated = self.follow(f"{name}.{calibrate.ACTIVATED}", nn.functional.silu(gate) * up)
        answers = torch.stack([row @ module.down_proj[e] for row, e in zip(activated, expert.flatten(), strict=True)])
        return answers.view(*expert.shape, -1).sum(1).view_as(x)


def following_model(directory: Path, following: Following) -> Llama4Text:
    """The model with weights rounded to FP8, its matrices' inputs taken over, in float32 otherwise."""
    model = load_reference(open_checkpoint(directory))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            module.weight.copy_(per_output(module.weight))
            module.register_forward_pre_hook(partial(following.linear, name))
        elif isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(per_output(weight.transpose(1, 2)).transpose(1, 2))
            module.forward = partial(following.experts, module, name)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("form", ["scout", "maverick", "topk2", "guard", "demo"])
def test_the_graph_computes_what_pytorch_computes_with_the_same_fp8_numbers(
    tiny_checkpoint: Checkpoint, lowered: Lowered, tmp_path: Path, form: str
) -> None:
    directory = DEMO if form == "demo" else tiny_checkpoint(form)
    if form == "demo":
        (tmp_path / "out").symlink_to(lowered("fp8"))
    else:
        compile(directory, tmp_path / "out", FP8)
    bundle = open_bundle((tmp_path / "out").resolve())
    bundle = Bundle(bundle.directory, dataclasses.replace(bundle.manifest, stage="ready"))
    recording = Recording(bundle)
    ids = np.random.default_rng(1).integers(0, 256, 37).tolist()
    got = LLM(bundle, session=recording, max_context=128).score(ids)
    following = Following(recording, activation_ranges(open_checkpoint(directory), FP8))
    with torch.no_grad():
        want = following_model(directory, following).logits(torch.tensor([ids]))[0].numpy()
    assert np.abs(got - want).max() < LOGITS_TOLERANCE * np.abs(want).max()
    assert 0 < following.flips < FLIPS * following.count


@pytest.mark.parametrize("form", ["maverick", "topk2"])
def test_matrices_are_cut_into_jobs_and_give_the_same_bytes(tiny_checkpoint: Checkpoint, form: str) -> None:
    """A job reads at most `limit` numbers, however large the matrix is; an output's scale still is of all its inputs."""
    checkpoint, limit = open_checkpoint(tiny_checkpoint(form)), 1024
    plan = lower(checkpoint, FP8).plan

    def execute(limit: int) -> list[tuple[str, bytes]]:
        jobs = plan_jobs(plan, plan.placements(), limit)
        whole = {entry.name for entry in plan if entry.cut is None}
        assert all(job.elements <= limit for job in jobs if whole.isdisjoint(o.entry for o in job.outputs))
        made = sorted((o.entry, o.offset, data) for job in jobs for o, data in run_job(job, checkpoint.read_piece))
        return [(name, b"".join(data for _, _, data in parts)) for name, parts in groupby(made, key=itemgetter(0))]

    cut = [entry for entry in plan if entry.cut is not None and kind_of(entry.weight).quantized]
    assert {math.prod(piece.shape) > limit for entry in cut for piece in entry.pieces} == {True}
    assert execute(limit) == execute(1 << 30)


def test_every_matrix_has_a_range_and_experts_have_two(tiny_checkpoint: Checkpoint) -> None:
    ranges = activation_ranges(open_checkpoint(tiny_checkpoint("maverick")), FP8)
    for layer in range(5):
        names = [f"layers.{layer}.self_attn.{x}_proj" for x in "qkvo"]
        mlp = f"layers.{layer}.feed_forward"
        names += [f"{mlp}.experts.input", f"{mlp}.experts.activated"] if layer % 2 else [f"{mlp}.down_proj"]
        assert all(ranges[name] > 0 for name in names)
    assert activation_ranges(open_checkpoint(tiny_checkpoint("maverick")), Recipe()) == {}


def test_a_range_is_the_largest_magnitude_that_the_text_shows(tiny_checkpoint: Checkpoint) -> None:
    checkpoint, text = open_checkpoint(tiny_checkpoint("maverick")), "def merge(left, right):"
    model, seen = load_reference(checkpoint), dict[str, Tensor]()
    attention, experts = (
        model.get_submodule(name) for name in ("layers.2.self_attn.o_proj", "layers.1.feed_forward.experts")
    )
    attention.register_forward_pre_hook(lambda _, inputs: seen.update(attention=inputs[0]))
    experts.register_forward_pre_hook(lambda _, inputs: seen.update(input=inputs[0], logits=inputs[1]))
    ids = Tokenizer.from_file(str(tiny_checkpoint("maverick") / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        model.logits(torch.tensor([ids]))
    ranges = largest_inputs(checkpoint, text)
    assert ranges["layers.2.self_attn.o_proj"] == float(seen["attention"].abs().max())
    largest = (seen["input"] * seen["logits"].amax(-1, keepdim=True).sigmoid()).abs().max()
    assert ranges["layers.1.feed_forward.experts.input"] == pytest.approx(float(largest), rel=1e-6)


def test_calibration_that_cannot_be_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json, and FP8 is calibrated on a text"):
        activation_ranges(open_checkpoint(Path("synthetic:debug")), FP8)
    monkeypatch.setattr(calibrate, "usable_memory", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match="runs the whole model in float32"):
        compile(tiny_checkpoint("guard"), tmp_path / "out", FP8)
    assert not (tmp_path / "out").exists()
