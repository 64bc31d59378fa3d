"""Where corral keeps what it can make again: the user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`corral` in the directory that XDG_CACHE_HOME names, or in ~/.cache. Need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "corral"
