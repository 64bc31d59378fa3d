"""Buffers for kernels on the CPU that end where memory may not be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RunOnCpu = Callable[..., None]


def guarded(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy whose last byte is the last of a page, before one that may not be touched: reading past it ends the test."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    mapping = mmap.mmap(-1, room + page)
    forbid(np.frombuffer(mapping, np.uint8)[room:])
    inside = np.frombuffer(mapping, np.uint8, array.nbytes, room - array.nbytes).view(array.dtype)
    copy = inside.reshape(array.shape)
    copy[...] = array
    return copy


def forbid(pages: NDArray[np.generic]) -> None:
    """Make whole pages neither readable nor writable."""
    assert pages.ctypes.data % mmap.PAGESIZE == 0 and pages.nbytes % mmap.PAGESIZE == 0
    libc = ctypes.CDLL(None, use_errno=True)
    protect_none = 0
    assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.nbytes), protect_none) == 0
