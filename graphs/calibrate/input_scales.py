"""AWQ's scales of every matrix's inputs, searched layer by layer, and folded into what makes those inputs.

| made by                           | read by                                    | each input's scale            |
| --------------------------------- | ------------------------------------------ | ----------------------------- |
| input norm                        | q, k, v                                    | one vector                    |
| v                                 | o                                          | tied among a KV head's queries |
| norm before the feed-forward      | gate, up; shared, all experts', the router | one vector: see below         |
| up half (SwiGLU: silu(gate) * up) | down                                       | one vector a matrix, an expert's its own |
| last norm                         | head                                       | one vector                    |

Exact for experts, too: the gate that scales what an expert sees is one number a token. Where a matrix on either side is kept
as the checkpoint publishes it, nothing is scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from corral.graphs.calibrate.statistics import Statistics, input_site
from corral.graphs.calibrate.streamed_model import pieces_of
from corral.graphs.quantize.awq import ALPHAS, alpha_losses, input_scales
from corral.graphs.quantize.methods import AS_PUBLISHED, MIN_TOKENS, method_for
from corral.model.checkpoint.checkpoint import Checkpoint
from corral.model.checkpoint.names import HEAD
from corral.spec.progress import Progress, silent
from corral.spec.quant_scheme import scheme_named
from corral.spec.recipe import Recipe
from corral.spec.weight_plan import JOB_ELEMENTS

Scales = dict[str, NDArray[np.float32]]
Reader = tuple[str, int | None]  # a matrix: parameter, and which expert's


def search_input_scales(
    checkpoint: Checkpoint, statistics: Statistics, recipe: Recipe, progress: Progress = silent
) -> None:
    """Leave every layer's scales beside its statistics; layers that are there already are not searched again."""
    config = checkpoint.config
    search = _Search(checkpoint, statistics, recipe)
    for i in range(config.num_layers):
        progress("search scales", i, config.num_layers + 1, "layers")
        if not (path := statistics.scales_path(f"layers.{i}")).exists():
            statistics.save(path, search.layer(i))
    progress("search scales", config.num_layers, config.num_layers + 1, "layers")
    if not (path := statistics.scales_path(HEAD)).exists():
        scale = search.best(search.magnitude(HEAD), [(HEAD, None)])
        statistics.save(path, {f"{HEAD}.input_scales": scale, "norm.weight.output_scales": scale})


@dataclasses.dataclass(frozen=True)
class _Search:
    checkpoint: Checkpoint
    statistics: Statistics
    recipe: Recipe

    def layer(self, i: int) -> Scales:
        """All scales of a layer, by parameter."""
        config = self.checkpoint.config
        attention, forward = f"layers.{i}.self_attn", f"layers.{i}.feed_forward"
        moe = config.layers[i].moe
        dense = f"{forward}.shared_expert" if moe else forward
        query, key, value, out = (f"{attention}.{part}_proj.weight" for part in "qkvo")
        gate, up, down = (f"{dense}.{part}_proj.weight" for part in ("gate", "up", "down"))
        scales: Scales = {}

        entering = self.best(self.magnitude(query), [(query, None), (key, None), (value, None)])
        scales |= {f"{name}.input_scales": entering for name in (query, key, value)}
        scales[f"layers.{i}.input_layernorm.weight.output_scales"] = entering

        heads = self.magnitude(out).reshape(config.num_key_value_heads, -1, config.head_dim)
        tied = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape)
        leaving = self.best(tied.reshape(-1), [(out, None)], maker=value)
        scales[f"{out}.input_scales"] = leaving
        scales[f"{value}.output_scales"] = np.ascontiguousarray(leaving.reshape(heads.shape)[:, 0].reshape(-1))

        gate_up, expert_down = (f"{forward}.experts.{part}_proj" for part in ("gate_up", "down"))
        experts = range(config.num_local_experts) if moe else range(0)
        readers: list[Reader] = [(gate, None), (up, None), *((gate_up, e) for e in experts)]
        entering = self.best(self.magnitude(gate), readers)
        scales |= {f"{name}.input_scales": entering for name in (gate, up, *((gate_up,) if moe else ()))}
        scales[f"layers.{i}.post_attention_layernorm.weight.output_scales"] = entering

        middle = self.best(self.magnitude(down), [(down, None)], maker=up)
        scales |= {f"{down}.input_scales": middle, f"{up}.output_scales": middle}
        if moe:
            scales[f"{forward}.router.weight.input_scales"] = entering
            middles = np.stack(
                [self.best(self.magnitude(expert_down, e), [(expert_down, e)], maker=gate_up) for e in experts]
            )
            scales[f"{expert_down}.input_scales"] = middles
            scales[f"{gate_up}.output_scales"] = np.concatenate([np.ones_like(middles), middles], axis=1)
        return scales

    def magnitude(self, name: str, expert: int | None = None) -> NDArray[np.float64]:
        """Mean |x| of a matrix's inputs; nothing is known of those that too few tokens reached."""
        seen = self.statistics.inputs(input_site(name), expert)
        tokens = seen["tokens"].item()
        known = seen["magnitude"].astype(np.float64) / max(tokens, 1)
        return known if tokens >= MIN_TOKENS else np.zeros_like(known)

    def best(
        self, magnitude: NDArray[np.float64], readers: Sequence[Reader], maker: str | None = None
    ) -> NDArray[np.float32]:
        """The scales of least error of all readers together; `maker` is the matrix that the inputs come from, if it is one."""
        kept = any(self._kept(name) for name in (*(name for name, _ in readers), *filter(None, [maker])))
        if kept or not magnitude.any():
            return np.ones(len(magnitude), np.float32)
        losses = np.zeros(len(ALPHAS))
        for name, expert in readers:
            recipe = self.recipe.of(name)
            bits = scheme_named(recipe.weights).bits
            assert bits is not None
            blocks = self.statistics.inputs(input_site(name), expert)["blocks"]
            for weight in self._matrix(name, expert):
                losses += alpha_losses(
                    weight,
                    magnitude,
                    blocks,
                    bits=bits,
                    group_size=recipe.group_size,
                    asymmetric=recipe.asymmetric,
                )
        return input_scales(magnitude, ALPHAS[int(losses.argmin())])

    def _kept(self, name: str) -> bool:
        return method_for(self.checkpoint.info(name).published, self.recipe.of(name)) is AS_PUBLISHED

    def _matrix(self, name: str, expert: int | None) -> Iterator[NDArray[np.float32]]:
        """A matrix [outputs, inputs], some of its rows at a time."""
        piece = pieces_of(self.checkpoint, name)[expert or 0]
        outputs, inputs = piece.shape
        rows = max(1, JOB_ELEMENTS // inputs)
        for start in range(0, outputs, rows):
            yield self.checkpoint.read(dataclasses.replace(piece, rows=(start, min(start + rows, outputs))))
