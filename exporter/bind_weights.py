"""Initializers of a captured graph -> entries of a WeightPlan that read the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import onnx_ir as ir

from corral.exporter.planned_tensor import replace_initializer
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import EMBEDDING, HEAD
from corral.model.checkpoint.store import TensorInfo
from corral.spec.weight_plan import Entry, Source, WeightPlan, step

# The table is no graph's initializer: the runtime gathers from it. Scales are there where a rule quantizes it.
EMBEDDING_ENTRY, EMBEDDING_SCALES = "embedding", "embedding.scales"


def bind_weights(model: ir.Model, checkpoint: Checkpoint) -> WeightPlan:
    """Replace every parameter's initializer by a planned one, and return the plan (the embedding table included)."""
    graph = model.graph
    plan = WeightPlan({})
    for name, initializer in list(graph.initializers.items()):
        if name not in checkpoint.names and name != HEAD:
            assert initializer.const_value is not None
            initializer.name = "rope_frequencies"  # the one constant of the model that is a tensor
            initializer.const_value = ir.tensor(initializer.const_value.numpy(), name=initializer.name)
            continue
        plan.add(entry := parameter_entry(name, checkpoint.info(name)))
        replace_initializer(graph, initializer, entry)
    plan.add(embedding_entry(checkpoint))
    return plan


def parameter_entry(name: str, info: TensorInfo) -> Entry:
    """The entry that stores a parameter as the model has it, in float32.

    Vectors [N] and matrices [outputs, inputs] are one piece; fused experts [E, inputs, outputs] one piece an expert.
    """
    shape, tensor = info.shape, info.name
    pieces: tuple[Source, ...]
    if len(shape) == 3:
        experts, inputs, outputs = shape
        pieces = tuple(
            Source(tensor, rows=(0, outputs), columns=(0, inputs), index=e, transposed=True) for e in range(experts)
        )
        return _float_entry(name, info, pieces, layout="columns", cut="columns")
    if len(shape) == 2:
        pieces = (Source(tensor, rows=(0, shape[0]), columns=(0, shape[1])),)
        return _float_entry(name, info, pieces, layout="rows", cut="rows")
    return _float_entry(name, info, (Source(tensor, rows=(0, shape[0])),), layout="rows", cut=None)


def embedding_entry(checkpoint: Checkpoint) -> Entry:
    """The embedding table, row-major, in the checkpoint's own 16-bit type (or float32): the runtime gathers its rows."""
    info = checkpoint.info(EMBEDDING)
    source = Source(info.name, rows=(0, info.shape[0]), columns=(0, info.shape[1]))
    dtype = info.dtype if info.dtype in ("bfloat16", "float16") else "float32"
    entry = _float_entry(EMBEDDING_ENTRY, info, (source,), layout="rows", cut="rows", dtype=dtype)
    return dataclasses.replace(entry, weight=EMBEDDING)


def _float_entry(
    name: str,
    info: TensorInfo,
    pieces: tuple[Source, ...],
    *,
    layout: str,
    cut: Literal["rows", "columns"] | None,
    dtype: str = "float32",
) -> Entry:
    return Entry(
        name=name,
        dtype=dtype,
        shape=info.shape,
        pieces=pieces,
        steps=(step(layout, dtype=dtype),),
        weight=name,
        parameters=math.prod(info.shape),
        cut=cut,
        published=info.published,
    )
