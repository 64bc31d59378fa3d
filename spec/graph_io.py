"""The names of a decoder graph's inputs and outputs: the contract between the exporter, every lowering and the runtime.

| input                    | dtype   | shape                         | meaning                                             |
| ------------------------ | ------- | ----------------------------- | --------------------------------------------------- |
| `embeddings`             | float32 | [batch, tokens, hidden]       | rows of the embedding table, or image features      |
| `positions`              | int64   | [batch, tokens]               | absolute position of each new token                 |
| `logit_rows`             | int64   | [batch, rows]                 | which of the new tokens to compute logits for       |
| `past_length.<kv class>` | int64   | [batch]                       | rows of that class's caches that are already filled |
| `past_key.<layer>`       | KV      | [batch, kv heads, capacity, head dim] | cache of fixed capacity                     |
| `past_value.<layer>`     | KV      | [batch, kv heads, capacity, head dim] |                                             |

| output                   | dtype   | shape                         |                                                     |
| ------------------------ | ------- | ----------------------------- | --------------------------------------------------- |
| `logits`                 | float32 | [batch, rows, vocab]          |                                                     |
| `present_key.<layer>`    | KV      | as `past_key.<layer>`         | the cache with the new rows written; may be bound to the same memory |
| `present_value.<layer>`  | KV      | as `past_value.<layer>`       |                                                     |

KV is the type of the target's caches, `dtype` of the manifest's KV classes: float32, or float16 where it says so. Where
it says int8 or int4, caches are uint8 and their last axis is the bytes of a row (spec.kv_layout), not head dim.

A decoder may be cut into stages, a graph for each range of layers. A stage has the caches and lengths of its own layers
only; each but the first takes `hidden` in place of `embeddings`, each but the last yields `next_hidden` in place of
`logits` (and takes no `logit_rows`). Both are float32 [batch, tokens, hidden]: the residual stream between two layers.

New token `s` of batch row `b` is written to cache row `past_length[b] + s` and sees cache rows up to its own. Rows past
the filled ones may hold anything finite. All `tokens` new tokens are written, padding included, so `past_length + tokens`
never exceeds the capacity, and for a chunked layer the new tokens never cross a chunk boundary.
"""

from __future__ import annotations

from corral.spec.model_config import KvClass

EMBEDDINGS = "embeddings"
POSITIONS = "positions"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"
HIDDEN = "hidden"
NEXT_HIDDEN = "next_hidden"


def past_length(kv_class: KvClass) -> str:
    return f"past_length.{kv_class}"


def past_key(layer: int) -> str:
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    return f"past_value.{layer}"


def present_key(layer: int) -> str:
    return f"present_key.{layer}"


def present_value(layer: int) -> str:
    return f"present_value.{layer}"


def is_cache(name: str) -> bool:
    """Whether an input or output is a key or value cache."""
    return name.startswith(("past_key.", "past_value.", "present_key.", "present_value."))
