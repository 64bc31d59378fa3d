"""What a builder measured, kept for the next build: `tensorrt` times its kernels, which is most of a build's minutes.

TensorRT for RTX chooses without timing; its calls for a cache exist and do nothing. Never executed with `tensorrt`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def read_timing_cache(config: Any, path: Path) -> None:
    """Give a builder's config what was kept at `path`; an empty cache where nothing was, or of another version or GPU."""
    kept = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timing_cache(config: Any, path: Path) -> None:
    """Keep what a config's cache holds after a build."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(config.get_timing_cache().serialize())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
