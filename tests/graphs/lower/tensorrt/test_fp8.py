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
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from corral.graphs import compile
from corral.graphs.calibrate.calibration_text import read_calibration_text
from corral.graphs.calibrate.statistics import input_site
from corral.graphs.compiler import lower
from corral.graphs.execute.job import plan_jobs, run_job
from corral.graphs.quantize.e4m3 import input_scale
from corral.graphs.quantize.kinds import kind_of
from corral.graphs.stages import export_stage, lower_stage, quantize_stage
from corral.model.checkpoint.open import open_checkpoint
from corral.model.checkpoint.reference import load_reference
from corral.model.text import Experts, Llama4Text
from corral.runtime import LLM
from corral.spec.bundle import Bundle, open_bundle
from corral.spec.errors import InputError
from corral.spec.recipe import Recipe
from corral.spec.rule import Rule
from corral.validate.engine_graph import EngineGraph, Values, as_ready

DEMO = Path(__file__).parents[4] / "demo" / "demo-scout"
FP8 = Recipe(target="tensorrt-rtx", weights="fp8", max_context=128, calibration_tokens=1024)
# Of the largest magnitude: inputs of products, some float16 operations after the product before (6e-4 to 1.6e-3 is seen,
# most after attention), and logits, which are a product and its gains rounded to float16 (ONNX Runtime does not round:
# 7e-7).
TOLERANCE, LOGITS_TOLERANCE = 4e-3, 2.0**-10
# Numbers near enough to the middle between two of FP8: float16's error by the distance of FP8 numbers. 0.3 to 0.5 % is seen.
FLIPS = 0.01
BASE = 2.0**-12
Checkpoint = Callable[[str], Path]
Lowered = Callable[[str], Path]


class Recording(EngineGraph):
    """A session over the lowered graph that keeps what it rounds to FP8: name -> (before, after) for each step."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(self._recorded)
        (record,) = bundle.manifest.graphs
        model = onnx.load(bundle.path(record.path), load_external_data=False)
        made = {name: node for node in model.graph.node for name in node.output}
        read_by = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        self.marked: dict[str, tuple[str, str]] = {}
        self.slots: dict[str, str] = {}  # of a layer's experts: the row of each visit
        self.scales = input_scales(bundle.directory)
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                name = node.input[1].removesuffix(".input_scale")
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

    def _recorded(self, inputs: Values) -> Values:
        names = [output.name for output in self._session.get_outputs()]
        out = dict(zip(names, self._session.run(names, inputs), strict=True))
        self.steps.append(out)
        return out

    def rounded(self, name: str) -> tuple[Tensor, Tensor]:
        """What was rounded at `name`, before and after, [tokens, inputs]; of experts one row a visit."""
        experts, _, _ = name.rpartition(".")
        parts: dict[int, list[Tensor]] = defaultdict(list)
        for out in self.steps:
            for i, value in enumerate(self.marked[name]):
                rows = torch.from_numpy(out[value].astype(np.float32)).flatten(0, -2)
                if experts in self.slots:
                    rows = rows[torch.from_numpy(out[self.slots[experts]].astype(np.int64))]
                parts[i].append(rows)
        return torch.cat(parts[0]), torch.cat(parts[1])


def input_scales(bundle: Path) -> dict[str, float]:
    """What the graph's planned scales became: site -> scale."""
    graph = onnx.load(bundle / "decoder.onnx").graph
    found = {tensor.name: tensor for tensor in graph.initializer if tensor.name.endswith(".input_scale")}
    return {
        name.removesuffix(".input_scale"): onnx.numpy_helper.to_array(tensor).item() for name, tensor in found.items()
    }


def rounded(x: Tensor, scale: float | Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def per_output(matrix: Tensor) -> Tensor:
    """[outputs, inputs], each output scaled by its own largest magnitude; the scale's gain is a float16 number."""
    scale = matrix.abs().amax(-1, keepdim=True) / 448
    codes = (matrix / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return codes * (scale / BASE).half().float() * BASE


class Following:
    """Puts the graph's FP8 numbers into PyTorch, and checks each on its way."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.flips = self.count = 0

    def follow(self, name: str, x: Tensor) -> Tensor:
        """x [..., inputs] of PyTorch -> what the graph rounded it to."""
        before, after = self.recording.rounded(name)
        own, scale = x.flatten(0, -2), self.recording.scales[name]
        assert (before - own).abs().max() < TOLERANCE * own.abs().max(), name
        # ONNX Runtime gives codes times scale in float16: the codes are those nearest to it.
        codes = (after / scale).to(torch.float8_e4m3fn).float()
        assert (after - codes * scale).abs().max() <= 2.0**-11 * after.abs().max(), name
        assert torch.equal(codes * scale, rounded(before, scale)), name
        self.flips += int((codes * scale != rounded(own, scale)).sum())
        self.count += codes.numel()
        return (codes * scale).view_as(x)

    def linear(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self.follow(input_site(name), *inputs),)  # q, k and v see one rounding of one value

    def experts(self, module: Experts, name: str, x: Tensor, router_logits: Tensor) -> Tensor:
        """One visit after the other, in the order of the tokens."""
        logits, expert = router_logits.flatten(0, -2).topk(module.num_experts_per_tok, dim=-1)
        visits = x.flatten(0, -2)[:, None] * logits.sigmoid()[..., None]
        visits = self.follow(f"{name}.gate_up_proj", visits.flatten(0, 1))
        both = torch.stack([row @ module.gate_up_proj[e] for row, e in zip(visits, expert.flatten(), strict=True)])
        gate, up = both.chunk(2, dim=-1)
        activated = self.follow(f"{name}.down_proj", nn.functional.silu(gate) * up)
        answers = torch.stack([row @ module.down_proj[e] for row, e in zip(activated, expert.flatten(), strict=True)])
        return answers.view(*expert.shape, -1).sum(1).view_as(x)


def in_groups(matrix: Tensor) -> Tensor:
    """[outputs, inputs] -> what symmetric int4 in groups of 32 inputs makes of it; scales are float16 numbers."""
    groups = matrix.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale.half().float()).flatten(-2)


def in_groups_of_fp8(matrix: Tensor) -> Tensor:
    """[outputs, inputs] -> what W4A8 makes of it: int4 in groups of 32, each value rounded to FP8 with its output's scale."""
    groups = matrix.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    output = scale.amax(-2, keepdim=True) * 8 / 448
    ratio = (scale / output * BASE).half().float()
    codes = (((groups / scale).round() * ratio).half().float() / BASE).to(torch.float8_e4m3fn).float()
    return (codes * (output / BASE).half().float() * BASE).flatten(-2)


ROUNDED = {"fp8": per_output, "int4": in_groups, "w4a8": in_groups_of_fp8}


def following_model(directory: Path, following: Following, weights: str, experts: str) -> Llama4Text:
    """The model with weights rounded as the recipe says, FP8 products' inputs taken over, in float32 otherwise."""
    model = load_reference(open_checkpoint(directory))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            module.weight.copy_(ROUNDED[weights](module.weight))
            module.register_forward_pre_hook(partial(following.linear, name))
        elif isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(ROUNDED[experts](weight.transpose(1, 2)).transpose(1, 2))
            if experts != "int4":
                module.forward = partial(following.experts, module, name)  # type: ignore[method-assign]
    return model


FP8_FORMS = [(form, "fp8", "fp8") for form in ("scout", "maverick", "topk2", "guard", "demo")]
MIXED_FORMS = [
    ("maverick", "fp8", "int4"),
    ("topk2", "fp8", "int4"),
    ("scout", "fp8", "w4a8"),
    ("topk2", "w4a8", "w4a8"),
]


@pytest.mark.parametrize(("form", "weights", "experts"), [*FP8_FORMS, *MIXED_FORMS])
def test_the_graph_computes_what_pytorch_computes_with_the_same_fp8_numbers(
    tiny_checkpoint: Checkpoint, lowered: Lowered, tmp_path: Path, form: str, weights: str, experts: str
) -> None:
    directory = DEMO if form == "demo" else tiny_checkpoint(form)
    if form == "demo":
        (tmp_path / "out").symlink_to(lowered("fp8"))
    else:
        rules = (Rule(matrices="*.experts.*", weights=experts),) if experts != weights else ()
        compile(directory, tmp_path / "out", dataclasses.replace(FP8, weights=weights, rules=rules, group_size=32))
    bundle = open_bundle((tmp_path / "out").resolve())
    bundle = as_ready(bundle)
    recording = Recording(bundle)
    ids = np.random.default_rng(1).integers(0, 256, 37).tolist()
    got = LLM(bundle, session=recording, max_context=128).score(ids)
    following = Following(recording)
    with torch.no_grad():
        want = following_model(directory, following, weights, experts).logits(torch.tensor([ids]))[0].numpy()
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
        seen = {"layer_largest": np.ones(1, np.float32)}
        done = [made for job in jobs for made in run_job(job, checkpoint.read_piece, lambda source: seen)]
        made = sorted((output.entry, output.offset, data) for output, data in done)
        return [(name, b"".join(data for _, _, data in parts)) for name, parts in groupby(made, key=itemgetter(0))]

    cut = [entry for entry in plan if entry.cut is not None and kind_of(entry.weight).quantized]
    assert {math.prod(piece.shape) > limit for entry in cut for piece in entry.pieces} == {True}
    assert execute(limit) == execute(1 << 30)


@pytest.mark.parametrize("form", ["maverick", "topk2", "tied"])
def test_a_scale_is_the_largest_magnitude_that_the_text_shows(
    tiny_checkpoint: Checkpoint, tmp_path: Path, form: str
) -> None:
    """Of each different input once, of a layer's experts together; against the whole model's run over the same windows."""
    bundle = compile(tiny_checkpoint(form), tmp_path / "out", FP8)
    checkpoint = open_checkpoint(tiny_checkpoint(form))
    model, seen = load_reference(checkpoint), dict[str, float]()

    def experts(name: str, module: Experts, inputs: tuple[Tensor, Tensor]) -> None:
        x, logits = (value.flatten(0, -2) for value in inputs)
        for token, row in zip(x, logits, strict=True):
            for expert in row.topk(module.num_experts_per_tok).indices:
                routed = token * row[expert].sigmoid()
                gate, up = (routed @ module.gate_up_proj[expert]).chunk(2)
                for part, value in (("gate_up_proj", routed), ("down_proj", nn.functional.silu(gate) * up)):
                    note(f"{name}.{part}", value)

    def note(name: str, x: Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(partial(experts, name))
        elif isinstance(module, nn.Linear) and not name.endswith("router"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(input_site(name), inputs[0]))
    with torch.no_grad():
        model.logits(torch.from_numpy(read_calibration_text(checkpoint, FP8).ids))
    scales = input_scales(bundle.directory)
    assert scales.keys() == seen.keys()
    for name, largest in seen.items():
        assert scales[name] == pytest.approx(largest / 448, rel=2.0**-10), name


def test_an_input_that_is_always_zero_has_a_scale_that_float16_has() -> None:
    scale = input_scale(np.ones((1, 4), np.float32), statistics={"layer_largest": np.zeros(4, np.float32)})
    assert scale.astype(np.float16) == scale == 2.0**-14


def test_experts_may_be_int4_by_a_calibrated_method_and_all_else_fp8(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    rules = (Rule(matrices="*.experts.*", weights="int4", method="gptq"),)
    mixed = dataclasses.replace(FP8, rules=rules, group_size=32, calibration_tokens=4096)
    manifest = compile(tiny_checkpoint("maverick"), tmp_path / "out", mixed).manifest
    stored = {row.kind: row.stored for row in manifest.coverage}
    assert stored["experts"] == "int4 g32 gptq"
    assert {stored[kind] for kind in ("attention", "dense", "shared expert", "head")} == {"fp8 per output"}
    assert manifest.calibration is not None
    assert {fallback.weight.rpartition(".")[2] for fallback in manifest.calibration.fallbacks} <= {"experts"}
    assert manifest.recipe == mixed


def test_the_manifest_says_what_the_scales_were_seen_on(lowered: Lowered) -> None:
    record = open_bundle(lowered("fp8")).manifest.calibration
    assert record is not None
    assert (record.text, record.tokens, record.fallbacks) == ("python-library.txt", 1024, ())


def test_stages_by_themselves_give_the_same_graph_and_weights(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    compile(tiny_checkpoint("scout"), tmp_path / "whole", FP8)
    export_stage(tiny_checkpoint("scout"), tmp_path / "exported")
    quantize_stage(tmp_path / "exported", tmp_path / "quantized", FP8)
    lower_stage(tmp_path / "quantized", tmp_path / "lowered", FP8)
    for name in ("decoder.onnx", "weights-00000.bin"):
        assert (tmp_path / "lowered" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_without_a_tokenizer_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("guard"), tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json, which a calibration text needs.*--weights int4"):
        compile(tmp_path / "bare", tmp_path / "out", FP8)
    assert not (tmp_path / "out").exists()
