"""Freed memory goes back to the system.

glibc keeps what it was given back for the next request. After a long prompt that is more than a mapped model needs for itself:
278 MB were held where 114 were in use, with four layers of Scout's width and 2048 tokens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

WORTH_BYTES = 64_000_000  # of caches; for less, fetching it again would cost a small model more than it is worth


def give_memory_back() -> None:
    """Where the C library can be asked for it; elsewhere nothing happens."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of all that is loaded
        return None
