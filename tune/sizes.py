"""How many bytes a choice takes: of one part by formula, of a whole bundle counted in its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from corral.exporter.bind_weights import embedding_entry
from corral.exporter.export import Exported, export
from corral.graphs.bundle_size import bundle_bytes
from corral.graphs.calibrate.streamed_model import pieces_of
from corral.graphs.compiler import lower
from corral.graphs.quantize.embedding_table import TABLE_WEIGHTS
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe
from corral.spec.target import target_named
from corral.spec.weight_plan import ITEM_BITS
from corral.tune.choice import Choice, Storage
from corral.tune.parts import Part
from corral.tune.recipe_file import as_recipe

SCALE_BITS, TILED_SCALE_BITS = 32, 16  # the second where corral's kernels compute


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint, compiled for the target and kernels of `recipe`."""

    checkpoint: Checkpoint
    recipe: Recipe

    def stored(self, part: Part, storage: Storage) -> int:
        """A part's codes and scales, or floats, without what alignment adds."""
        weights, group = storage
        bits = scheme_named(weights).bits
        tiled = self.recipe.kernels == "corral" and not part.is_table
        if bits is None:
            per_weight = float(ITEM_BITS[embedding_entry(self.checkpoint).dtype if part.is_table else "float32"])
        else:
            per_weight = bits + (TILED_SCALE_BITS if tiled else SCALE_BITS) / group
        return int(self._weights(part) * per_weight) // 8

    def fits(self, part: Part, storage: Storage) -> bool:
        """Whether the group size divides the inputs of all of a part's matrices, and something computes such weights."""
        weights, group = storage
        kernels = target_named(self.recipe.target).kernels
        if part.is_table:
            able: tuple[str, ...] = ("fp32", *TABLE_WEIGHTS)  # the first: as published
        else:
            # Where corral has no kernels for a matrix, ONNX Runtime's compute it; experts cannot be divided so.
            able = kernels[self.recipe.kernels] + (() if part.is_experts else kernels["stock"])
        if weights not in able:
            return False
        inputs = (pieces_of(self.checkpoint, name)[0].shape[-1] for name in part.parameters)
        return not scheme_named(weights).is_quantized or all(count % group == 0 for count in inputs)

    def parts(self, chosen: Mapping[Part, Choice]) -> int:
        """All parts as they are chosen."""
        return sum(self.stored(part, choice.storage) for part, choice in chosen.items())

    def bundle(self, chosen: Mapping[Part, Choice]) -> int:
        """The bundle of such a choice, to the byte: lowers the checkpoint, whose graph is captured once for all choices."""
        work = lower(self.checkpoint, as_recipe(self.recipe, chosen), captured=self._captured)
        return bundle_bytes(work, self.checkpoint)

    @cached_property
    def _captured(self) -> Exported:
        return export(self.checkpoint)

    def visited(self, part: Part) -> float:
        """How many of a part's weights one token is multiplied with: of routed experts, those of the experts it visits."""
        config = self.checkpoint.config
        if part.is_table:
            return 0.0  # a row is looked up
        share = config.num_experts_per_tok / config.num_local_experts if part.is_experts else 1.0
        return self._weights(part) * share

    def _weights(self, part: Part) -> int:
        return sum(math.prod(piece.shape) for name in part.parameters for piece in pieces_of(self.checkpoint, name))
