"""How many bytes a choice takes: of one part by formula, of a whole bundle counted in its plan, of one token's reading."""

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
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import ITEM_BITS
from corral.tune.choice import Choice
from corral.tune.parts import Part
from corral.tune.recipe_file import as_recipe

Storage = tuple[str, int]  # weights, group size
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
        pieces = (piece for name in part.parameters for piece in pieces_of(self.checkpoint, name))
        return int(sum(math.prod(piece.shape) for piece in pieces) * per_weight) // 8

    def fits(self, part: Part, storage: Storage) -> bool:
        """Whether the group size divides the inputs of all of a part's matrices, and there are kernels for it."""
        weights, group = storage
        if self.recipe.kernels == "corral" and part.is_experts and not scheme_named(weights).is_quantized:
            return False
        inputs = (pieces_of(self.checkpoint, name)[0].shape[-1] for name in part.parameters)
        return not scheme_named(weights).is_quantized or all(count % group == 0 for count in inputs)

    def parts(self, chosen: Mapping[Part, Choice]) -> int:
        """All parts as they are chosen."""
        return sum(self.stored(part, (choice.weights, choice.group_size)) for part, choice in chosen.items())

    def bundle(self, chosen: Mapping[Part, Choice]) -> int:
        """The bundle of such a choice, to the byte: lowers the checkpoint, whose graph is captured once for all choices."""
        work = lower(self.checkpoint, as_recipe(self.recipe, chosen), captured=self._captured)
        return bundle_bytes(work, self.checkpoint)

    @cached_property
    def _captured(self) -> Exported:
        return export(self.checkpoint)

    def read(self, chosen: Mapping[Part, Choice]) -> float:
        """What one token reads of the parts: of experts, those that it visits."""
        return sum(
            self.stored(part, (choice.weights, choice.group_size)) * self.share_read(part)
            for part, choice in chosen.items()
        )

    def share_read(self, part: Part) -> float:
        """Of a part's bytes, those that one token reads."""
        config = self.checkpoint.config
        if part.is_table:
            return 0.0  # but for a row
        return config.num_experts_per_tok / config.num_local_experts if part.is_experts else 1.0
