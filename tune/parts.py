"""What is chosen for together: matrices that one kernel reads, and that are therefore stored alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from corral.model.checkpoint.names import HEAD
from corral.spec.model_config import ModelConfig
from corral.spec.rule import Rule

# Patterns of a layer's parts, with experts and without. The last one is gate, up and down: nothing else begins so.
ATTENTION = ("self_attn.[qkv]_proj", "self_attn.o_proj")
EXPERTS = ("feed_forward.shared_expert.*", "feed_forward.experts.*")
DENSE = ("feed_forward.[gud]*_proj",)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some matrices of the model. `pattern` names them in rules, `layer` is where they are (the head: behind the last)."""

    pattern: str
    layer: int
    parameters: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The pattern that names the like of it in every layer."""
        return self.pattern.replace(f"layers.{self.layer}.", "layers.*.", 1)


def parts_of(config: ModelConfig, names: Iterable[str]) -> tuple[Part, ...]:
    """All parts in the order of computation; `names` are the checkpoint's parameters."""
    parts = []
    for i, layer in enumerate(config.layers):
        for pattern in (*ATTENTION, *(EXPERTS if layer.moe else DENSE)):
            rule = Rule(matrices=f"layers.{i}.{pattern}")
            parameters = tuple(name for name in names if rule.matches(name))
            parts.append(Part(pattern=rule.matrices, layer=i, parameters=parameters))
    head = HEAD.removesuffix(".weight")
    return (*parts, Part(pattern=head, layer=config.num_layers, parameters=(HEAD,)))
