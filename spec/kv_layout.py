"""The two kinds of KV cache, in rows and bytes.

`chunked` layers only ever see their current chunk: at most `chunk` rows, starting again at row 0 at each boundary while
positions go on counting. `global` layers keep every token. Work is split at chunk boundaries, and then plain causal
attention over the rows *is* Llama 4's chunked attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.spec.model_config import KvClass, ModelConfig


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """The caches of one KV class: per layer a key and a value tensor [batch, num_heads, rows, head_dim]."""

    kv_class: KvClass
    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    chunk: int | None  # tokens; None for the global class

    def filled_rows(self, position: int) -> int:
        """Cache rows in use before the token at `position` is written."""
        return position % self.chunk if self.chunk else position

    def capacity(self, context: int) -> int:
        """Rows needed so that a sequence of `context` tokens fits."""
        return min(context, self.chunk) if self.chunk else context

    def bytes(self, context: int, itemsize: int = 4) -> int:
        """Bytes of keys and values of all this class's layers for one sequence of `context` tokens."""
        return 2 * len(self.layers) * self.num_heads * self.head_dim * self.capacity(context) * itemsize


def kv_layouts(config: ModelConfig) -> tuple[KvLayout, ...]:
    """The KV classes a model uses, chunked first."""
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


def split_at_chunks(start: int, count: int, chunk: int | None, limit: int | None = None) -> list[tuple[int, int]]:
    """Cut tokens [start, start + count) at chunk boundaries, and into pieces of at most `limit`: [(position, length)]."""
    pieces = []
    end = start + count
    while start < end:
        stop = min(end, (start // chunk + 1) * chunk if chunk else end, start + limit if limit else end)
        pieces.append((start, stop - start))
        start = stop
    return pieces
