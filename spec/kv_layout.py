"""The two kinds of KV cache, in rows and bytes.

`chunked` layers only ever see their current chunk: at most `chunk` rows, starting again at row 0 at each boundary while
positions go on counting. `global` layers keep every token. Work is split at chunk boundaries, and then plain causal
attention over the rows *is* Llama 4's chunked attention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from corral.spec.model_config import KvClass, ModelConfig
from corral.spec.recipe import Recipe
from corral.spec.target import target_named
from corral.spec.weight_plan import ITEM_BITS

# Caches that are quantized, row by row: values that share a scale, or a whole row of a narrower head. A row is its codes,
# then its scales in fp16 (kernels/src/cache_rows.h).
KV_GROUPS = {"int8": 128, "int4": 32}


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """The caches of one KV class: per layer a key and a value tensor [batch, num_heads, rows, row_items]."""

    kv_class: KvClass
    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    chunk: int | None  # tokens; None for the global class
    dtype: str = "float32"  # of the caches, as the target stores them: a float type, or one of KV_GROUPS
    fixed_rows: int | None = None  # where the graph's caches have a fixed size

    def filled_rows(self, position: int) -> int:
        """Cache rows in use before the token at `position` is written."""
        return position % self.chunk if self.chunk else position

    def capacity(self, context: int) -> int:
        """Rows a cache needs so that a sequence of `context` tokens fits."""
        if self.fixed_rows is not None:
            return self.fixed_rows
        return min(context, self.chunk) if self.chunk else context

    @property
    def array_dtype(self) -> str:
        """The type of the cache tensors: bytes where a row is codes and scales."""
        return "uint8" if self.dtype in KV_GROUPS else self.dtype

    @property
    def row_items(self) -> int:
        """How many of `array_dtype` one head's row has."""
        if self.dtype not in KV_GROUPS:
            return self.head_dim
        scales = -(-self.head_dim // KV_GROUPS[self.dtype])
        return (self.head_dim * ITEM_BITS[self.dtype] + scales * ITEM_BITS["float16"]) // 8

    def row_bytes(self) -> int:
        """Bytes of keys and values of all this class's layers for one row."""
        return 2 * len(self.layers) * self.num_heads * self.row_items * ITEM_BITS[self.array_dtype] // 8

    def bytes(self, context: int) -> int:
        """Bytes of keys and values of all this class's layers for one sequence of `context` tokens."""
        return self.capacity(context) * self.row_bytes()


def kv_layouts(config: ModelConfig) -> tuple[KvLayout, ...]:
    """The KV classes a model uses, chunked first, with caches of float32 and any number of rows."""
    return tuple(
        KvLayout(
            kv_class=kv_class,
            layers=tuple(i for i, layer in enumerate(config.layers) if layer.kv_class == kv_class),
            num_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            chunk=config.attention_chunk_size if kv_class == "chunked" else None,
        )
        for kv_class in config.kv_classes
    )


def stored_kv_layouts(config: ModelConfig, recipe: Recipe) -> tuple[KvLayout, ...]:
    """The KV classes as the recipe's target stores them: the type of the caches and, where it fixes them, their rows."""
    target = target_named(recipe.target)
    return tuple(
        dataclasses.replace(
            layout,
            dtype=recipe.kv_dtype,
            fixed_rows=layout.capacity(recipe.max_context) if target.engine else None,
        )
        for layout in kv_layouts(config)
    )


def split_at_chunks(start: int, count: int, chunk: int | None, limit: int | None = None) -> list[tuple[int, int]]:
    """Cut tokens [start, start + count) at chunk boundaries, and into pieces of at most `limit`: [(position, length)]."""
    pieces = []
    end = start + count
    while start < end:
        stop = min(end, (start // chunk + 1) * chunk if chunk else end, start + limit if limit else end)
        pieces.append((start, stop - start))
        start = stop
    return pieces
