"""A Session over a bundle's engines: caches stay on the GPU, decode steps are recorded once and launched again.

A step is cut into *pieces* that the engines' profiles take: prefill in pieces of at most so many tokens, and where
logits of more tokens are wanted than a profile computes at a time (scoring a text), piece by piece up to each. A piece of
one token is a decode step. Rows of a batch that have several tokens each are taken one after the other.

**Never executed on hardware.** Tests run this file with the very graphs that the builder was given, in ONNX Runtime,
behind a stand-in of `tensorrt` and of the device that checks shapes and addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from corral.runtime.gpu.cuda_device import Buffer, CudaDevice, Device, Recording
from corral.runtime.gpu.device_kv_cache import Address, DeviceKvCache, slot_bytes
from corral.runtime.gpu.engine_choice import choose_engines
from corral.runtime.gpu.tensorrt_engine import Shape, TensorRTEngine
from corral.runtime.gpu.weight_streaming import weight_budgets
from corral.runtime.session import CacheView, Float32, Step
from corral.runtime.stage_io import StageIo, check_stages, stage_io
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.kv_layout import KvLayout
from corral.spec.manifest import EngineRecord, GraphRecord

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens [start, stop) of batch rows [first, end); `rows` are those to compute logits for, counted from `start`."""

    first: int
    end: int
    start: int
    stop: int
    rows: tuple[int, ...]

    def inputs(self, step: Step) -> dict[str, Array]:
        """The part of a step's inputs that this piece is, contiguous."""
        b, s = slice(self.first, self.end), slice(self.start, self.stop)
        arrays: dict[str, Array] = {
            graph_io.EMBEDDINGS: step.embeddings_BSH[b, s],
            graph_io.POSITIONS: step.positions_BS[b, s],
            graph_io.LOGIT_ROWS: np.array([self.rows] * (self.end - self.first), np.int64),
            **{graph_io.past_length(kv): length[b] + self.start for kv, length in step.past_length_B.items()},
        }
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


class TensorRTSession:
    """Runs a bundle's engines, one stage after the other, on one GPU. Not for several threads at a time."""

    def __init__(self, bundle: Bundle, *, open_device: Callable[[], Device] = CudaDevice) -> None:
        manifest = bundle.manifest
        check_stages(bundle)
        self._device = open_device()
        engines = choose_engines(bundle, self._device)
        _check_memory(bundle, self._device)
        self._vocab_size, self._max_batch = manifest.model.vocab_size, manifest.recipe.max_batch
        self._slot_bytes = slot_bytes(manifest.kv)
        caches = 2 * sum(self._slot_bytes) * self._max_batch
        budgets = weight_budgets(bundle, engines, self._device, caches)
        self._stages = [
            _Stage(bundle, graph, engine, self._device, budget)
            for graph, engine, budget in zip(manifest.graphs, engines, budgets, strict=True)
        ]
        self._limits = self._stages[-1].limits()
        self._buffers = self._allocate(manifest.model.hidden_size)
        # Of decode steps, by batch rows: None after the first time, which makes TensorRT ready; recorded at the second.
        self._recorded: WeakKeyDictionary[CacheView[Address], dict[tuple[int, int], Recording | None]]
        self._recorded = WeakKeyDictionary()

    def new_caches(self, layouts: Sequence[KvLayout], max_context: int) -> DeviceKvCache:
        return DeviceKvCache(self._device, layouts, self._max_batch)

    def run(self, step: Step) -> Float32:
        logits = np.empty((*step.logit_rows_BR.shape, self._vocab_size), np.float32)
        for piece in cut(step, self._limits):
            found = self._run(step.caches, piece, piece.inputs(step))
            for b in range(piece.first, piece.end):
                for r, row in enumerate(step.logit_rows_BR[b] - piece.start):
                    if row in piece.rows:
                        logits[b, r] = found[b - piece.first, piece.rows.index(row)]
        return logits

    def release(self) -> None:
        """Nothing: what is recorded goes with the caches that it writes into."""

    def _run(self, caches: CacheView[Address], piece: Piece, inputs: Mapping[str, Array]) -> Float32:
        for name, array in inputs.items():
            self._device.upload(self._buffers[name].address, array)
        shapes = {name: array.shape for name, array in inputs.items()}
        shapes[graph_io.HIDDEN] = shapes[graph_io.EMBEDDINGS]

        def enqueue() -> None:
            for number, stage in enumerate(self._stages):
                stage.enqueue(shapes, self._addresses(number, caches, piece.first))

        if piece.stop - piece.start == 1:
            self._decode(caches, (piece.first, piece.end), shapes, enqueue)
        else:
            enqueue()
        logits = np.empty((piece.end - piece.first, len(piece.rows), self._vocab_size), np.float32)
        self._device.download(logits, self._buffers[graph_io.LOGITS].address)
        return logits

    def _decode(
        self,
        caches: CacheView[Address],
        rows: tuple[int, int],
        shapes: Mapping[str, Shape],
        enqueue: Callable[[], None],
    ) -> None:
        """Enqueue a step of one token: the first time as it is, then as one recording of all its kernels."""
        known = self._recorded.setdefault(caches, {})
        recording = known.get(rows)
        if recording is None and rows in known and all(stage.capturable(shapes) for stage in self._stages):
            recording = self._device.record(enqueue)
        known[rows] = recording
        if recording is None:
            enqueue()
        else:
            recording.launch()

    def _addresses(self, stage: int, caches: CacheView[Address], first: int) -> dict[str, Address]:
        """Where each input and output of a stage lies, for the batch rows from `first`."""
        io = self._stages[stage].io
        fixed = {name: self._buffers[name].address for name in io.inputs & self._buffers.keys()}
        if not io.first:
            fixed[io.source] = self._between(stage - 1)
        fixed[io.result] = self._buffers[graph_io.LOGITS].address if io.last else self._between(stage)
        for i in io.layers:
            key, value = (rows[i] + first * self._slot_bytes[i] for rows in (caches.keys, caches.values))
            fixed |= {graph_io.past_key(i): key, graph_io.present_key(i): key}
            fixed |= {graph_io.past_value(i): value, graph_io.present_value(i): value}
        return fixed

    def _between(self, stage: int) -> Address:
        """What a stage leaves for the next one: two places in turn, as the next one reads it while it writes its own."""
        return self._buffers[f"{graph_io.NEXT_HIDDEN}.{stage % 2}"].address

    def _allocate(self, hidden: int) -> dict[str, Buffer]:
        """Room on the device for the largest inputs and outputs, once: recorded steps hold the addresses."""
        tokens = max(limits.batch * limits.tokens for limits in self._limits)
        rows = max(limits.batch * limits.rows for limits in self._limits)
        batch = max(limits.batch for limits in self._limits)
        counts = {
            graph_io.EMBEDDINGS: 4 * tokens * hidden,
            graph_io.POSITIONS: 8 * tokens,
            graph_io.LOGIT_ROWS: 8 * rows,
            graph_io.LOGITS: 4 * rows * self._vocab_size,
            **{f"{graph_io.NEXT_HIDDEN}.{i}": 4 * tokens * hidden for i in range(2) if len(self._stages) > 1},
            **{graph_io.past_length(kv): 8 * batch for stage in self._stages for kv in stage.io.kv_classes},
        }
        return {name: self._device.allocate(count) for name, count in counts.items()}


@dataclass(frozen=True)
class Limits:
    """The most that a profile takes."""

    batch: int
    tokens: int  # of each row
    rows: int  # of logits, of each row


def cut(step: Step, limits: Sequence[Limits]) -> Iterator[Piece]:
    """The pieces of a step, in the order in which they must run."""
    batch, tokens = step.positions_BS.shape
    if tokens == 1:
        most = max(limit.batch for limit in limits)
        for first in range(0, batch, most):
            yield Piece(first=first, end=min(first + most, batch), start=0, stop=1, rows=(0,))
        return
    widest = max(limits, key=lambda limit: limit.tokens)
    for b in range(batch):
        wanted, start = sorted({int(row) for row in step.logit_rows_BR[b]}), 0
        while start < tokens:
            stop = min(start + widest.tokens, tokens)
            rows = [row for row in wanted if start <= row < stop][: widest.rows + 1]
            if len(rows) > widest.rows:
                stop = rows.pop()
            inside = tuple(row - start for row in rows)
            # A profile computes logits of one row at least; those of a last one that nobody asked for are dropped.
            yield Piece(first=b, end=b + 1, start=start, stop=stop, rows=inside or (stop - start - 1,))
            start = stop


class _Stage:
    """One engine, checked against the manifest."""

    def __init__(
        self, bundle: Bundle, graph: GraphRecord, record: EngineRecord, device: Device, weight_budget: int | None
    ) -> None:
        path = bundle.path(record.path)
        self.io: StageIo = stage_io(bundle.manifest.model, graph)
        self._engine = TensorRTEngine(path, record, device, weight_budget)
        self.io.check(str(path), self._engine.inputs, self._engine.outputs)
        self._check_types(bundle)
        self._check_aliases()

    def limits(self) -> list[Limits]:
        """Of the last stage, by profile."""
        largest = [{name: most for name, (_, most) in p.ranges.items()} for p in self._engine.profiles]
        return [
            Limits(shapes[graph_io.POSITIONS][0], shapes[graph_io.POSITIONS][1], shapes[graph_io.LOGIT_ROWS][1])
            for shapes in largest
        ]

    def enqueue(self, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]) -> None:
        profile = self._profile(shapes)
        batch = shapes[graph_io.POSITIONS][0]
        ranges = self._engine.profiles[profile].ranges
        caches = {name: (batch, *ranges[name][1][1:]) for name in self.io.inputs if graph_io.is_cache(name)}
        own = {name: shapes[name] for name in self.io.inputs if name not in caches}
        self._engine.enqueue(profile, own | caches, addresses)

    def capturable(self, shapes: Mapping[str, Shape]) -> bool:
        return self._engine.capturable(self._profile(shapes))

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The first that takes them: decode comes before prefill."""
        named = {name: shape for name, shape in shapes.items() if name in self.io.inputs}
        for profile in self._engine.profiles:
            if all(profile.takes(name, shape) for name, shape in named.items()):
                return profile.index
        raise InputError(f"{self._engine.path} has no profile for {named}. Build it again with `corral build`.")

    def _check_types(self, bundle: Bundle) -> None:
        layouts = {i: layout for layout in bundle.manifest.kv for i in layout.layers}
        kinds = dict.fromkeys(self.io.inputs, "int64") | {self.io.source: "float32"}
        for i in self.io.layers:
            kinds |= {graph_io.past_key(i): layouts[i].dtype, graph_io.past_value(i): layouts[i].dtype}
        wrong = [name for name in sorted(kinds) if self._engine.inputs[name] != kinds[name]]
        if wrong:
            name = wrong[0]
            raise InputError(
                f"{self._engine.path}: {name} is {self._engine.inputs[name]}, expected {kinds[name]} as the manifest "
                "says. Build it again with `corral build`."
            )

    def _check_aliases(self) -> None:
        """Caches must be written in place: otherwise the engine would read rows that it has overwritten."""
        for i in self.io.layers:
            for past, present in (
                (graph_io.past_key(i), graph_io.present_key(i)),
                (graph_io.past_value(i), graph_io.present_value(i)),
            ):
                if self._engine.aliased_input(present) != past:
                    raise InputError(
                        f"{self._engine.path} does not update {past} in place, which corral's runtime relies on. Build "
                        "it again with `corral build`; if that does not help, please report this."
                    )


def _check_memory(bundle: Bundle, device: Device) -> None:
    streamed = bundle.manifest.recipe.weight_streaming  # then none must be there
    weights = sum(record.bytes for record in bundle.manifest.coverage if record.kind != "embedding" and not streamed)
    caches, free = 2 * sum(slot_bytes(bundle.manifest.kv)), device.free_memory()
    if weights + caches > free:
        raise EnvironmentProblem(
            f"{bundle.directory} needs at least {(weights + caches) / 1e9:.1f} GB of {device.name}'s memory "
            f"({weights / 1e9:.1f} GB of weights, {caches / 1e9:.1f} GB of caches a sequence), and {free / 1e9:.1f} GB "
            "are free. Stop what else uses the GPU, compile with a smaller --max-context or more compressed weights, or "
            "take a larger GPU."
        )
