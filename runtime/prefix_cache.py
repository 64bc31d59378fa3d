"""What prompts that begin alike need not compute again: cache rows of blocks of tokens, kept after their request is gone.

A block is known by the hash of its tokens and of the block before it, so by everything its rows depend on (Kwon et al.,
arXiv 2309.06180, call it automatic prefix caching in vLLM). Global layers need the rows of every block of a prefix; chunked
layers see the current attention chunk only, so the rows that they had before it are not needed, and at the end of a
prompt no longer there. A prefix therefore ends at a chunk boundary, or in a chunk whose blocks have the chunked rows, too.

Rows are copied as they are, whatever they hold.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.runtime.kv_cache import KvCache
from corral.spec.kv_layout import KvLayout
from corral.spec.model_config import KvClass

BLOCK_TOKENS = 16

Rows = tuple[NDArray[Any], ...]  # keys and values of each layer of a class, [heads, tokens, …]


@dataclass
class Block:
    """The rows of some consecutive tokens, for each KV class for which they are kept."""

    rows: dict[KvClass, Rows] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for rows in self.rows.values() for array in rows)


class PrefixCache:
    """Blocks of one bundle in at most `max_bytes`; those not used for longest make room, the ends of prompts first."""

    def __init__(
        self, cache: KvCache, layouts: Sequence[KvLayout], max_bytes: int, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        self._cache, self._layouts, self.max_bytes = cache, tuple(layouts), max_bytes
        self._chunk = next((layout.chunk for layout in layouts if layout.chunk), None)
        # No block lies in two chunks.
        self.block_tokens = math.gcd(block_tokens, self._chunk) if self._chunk else block_tokens
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # the one used last comes last
        self.bytes = 0

    def prefix(self, token_ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest beginning of `token_ids` that can be restored."""
        keys = list(takewhile(self._blocks.__contains__, self._keys(token_ids)))
        self._touch(keys)
        blocks = [self._blocks[key] for key in keys]
        start = self._chunk_start(len(blocks))
        complete = sum(1 for _ in takewhile(self._is_complete, blocks[start:]))
        return blocks[: start + complete]

    def restore(self, token_ids: Sequence[int], slot: int) -> int:
        """Put the rows of the longest known beginning of a prompt into a slot; returns its tokens, less than all.

        The last token of a prompt is always left to compute, for the logits after it.
        """
        blocks = self.prefix(token_ids[:-1])
        for number, block in enumerate(blocks):
            for kv_class in self.needed(number, len(blocks)):
                self._cache.write_rows(slot, kv_class, self._row(kv_class, number), block.rows[kv_class])
        return len(blocks) * self.block_tokens

    def store(self, token_ids: Sequence[int], slot: int) -> None:
        """Keep the rows of a slot that holds `token_ids` and nothing after them, as far as there is room."""
        count, blocks = len(token_ids) // self.block_tokens, []
        first = (len(token_ids) - 1) // self._chunk * self._chunk // self.block_tokens if self._chunk else 0
        for number in range(count):
            block = Block()
            for layout in self._layouts:
                if layout.chunk is None or number >= first:  # chunked rows from before it were written over
                    row = self._row(layout.kv_class, number)
                    block.rows[layout.kv_class] = self._cache.rows(slot, layout.kv_class, row, row + self.block_tokens)
            blocks.append(block)
        self.add(token_ids, blocks)

    def add(self, token_ids: Sequence[int], blocks: Sequence[Block]) -> None:
        """Keep copies of the blocks at the beginning of `token_ids`, from the first on as many as there is room for."""
        keys = list(self._keys(token_ids))[: len(blocks)]
        self._touch(keys)
        own = set(keys)
        for key, block in zip(keys, blocks, strict=True):
            known = self._blocks.get(key, Block())
            new = {kv_class: rows for kv_class, rows in block.rows.items() if kv_class not in known.rows}
            if not self._make_room(sum(array.nbytes for rows in new.values() for array in rows), own):
                break
            for kv_class, rows in new.items():
                known.rows[kv_class] = tuple(array.copy() for array in rows)
            self.bytes += sum(array.nbytes for kv_class in new for array in known.rows[kv_class])
            self._blocks[key] = known
        self._touch(keys)

    def needed(self, number: int, count: int) -> list[KvClass]:
        """The classes whose rows of block `number` a prefix of `count` blocks needs."""
        return [x.kv_class for x in self._layouts if number >= self.first_needed(x.kv_class, count)]

    def first_needed(self, kv_class: KvClass, count: int) -> int:
        """The first block of whose tokens a prefix of `count` blocks needs the rows of a class."""
        return self._chunk_start(count) if self._layout(kv_class).chunk else 0

    def no_rows(self) -> dict[KvClass, Rows]:
        """Rows of no token at all, which show the type and shape of all rows."""
        self._cache.reserve(1, 1)
        return {layout.kv_class: self._cache.rows(0, layout.kv_class, 0, 0) for layout in self._layouts}

    def _chunk_start(self, count: int) -> int:
        """The first block of the chunk in which a prefix of `count` blocks ends; `count` where that is at its end."""
        return count - count % (self._chunk // self.block_tokens) if self._chunk else 0

    def _row(self, kv_class: KvClass, number: int) -> int:
        """The cache row of a block's first token."""
        return self._layout(kv_class).filled_rows(number * self.block_tokens)

    def _layout(self, kv_class: KvClass) -> KvLayout:
        return next(layout for layout in self._layouts if layout.kv_class == kv_class)

    def _is_complete(self, block: Block) -> bool:
        return all(layout.kv_class in block.rows for layout in self._layouts)

    def _keys(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        key, size = b"", self.block_tokens
        for start in range(0, len(token_ids) - size + 1, size):
            key = hashlib.sha256(key + np.array(token_ids[start : start + size], "<i8").tobytes()).digest()
            yield key

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Backwards, so that the end of a prefix goes before its beginning, without which it would be of no use."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _make_room(self, size: int, own: set[bytes]) -> bool:
        while self.bytes + size > self.max_bytes:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in own:
                return False
            self.bytes -= self._blocks.pop(oldest).bytes
        return True
