"""What a chosen expert's weights are mapped from gets into memory before anyone touches it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "kernels/src/read_ahead.cc"
PAGE = mmap.PAGESIZE
FILE_PAGES, BEGIN, PAGES = 6000, 700, 4000  # more than a fault reads by itself
PATIENCE = 60.0  # seconds; reading takes milliseconds

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="reading ahead is asked of Linux, and built with g++"
)


@contextmanager
def mapped(path: Path) -> Iterator[int]:
    """The address of a private mapping of a file, none of which is in memory where the file system lets go of it."""
    path.write_bytes(b"x" * FILE_PAGES * PAGE)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        view = ctypes.c_char.from_buffer(mapping)
        try:
            yield ctypes.addressof(view)
        finally:
            del view
            mapping.close()


def in_memory(address: int) -> list[bool]:
    """Of every page."""
    state = (ctypes.c_ubyte * FILE_PAGES)()
    failed = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(FILE_PAGES * PAGE), state
    )
    assert not failed, os.strerror(ctypes.get_errno())
    return [bool(page & 1) for page in state]


def test_all_that_was_asked_for_arrives_untouched_and_nothing_far_from_it(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(library)], check=True)
    read_ahead = ctypes.CDLL(str(library))["_ZN6corral10read_aheadEPKvl"]
    read_ahead.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    with mapped(tmp_path / "weights") as address:
        if any(in_memory(address)):
            pytest.skip("this file system keeps files in memory")
        # Not on a page's border, as a tensor's part need not be.
        read_ahead(address + BEGIN * PAGE + 100, PAGES * PAGE - 200)
        end = time.monotonic() + PATIENCE
        while not all((state := in_memory(address))[BEGIN : BEGIN + PAGES]):
            assert time.monotonic() < end, f"{sum(state)} of {PAGES} pages are in memory"
            time.sleep(0.001)
        assert not any(state[:BEGIN])
        assert not any(state[BEGIN + PAGES :])
        read_ahead(address + BEGIN * PAGE, PAGES * PAGE)  # all there: nothing to do
        read_ahead(address, 10)  # too little to matter
        assert not any(in_memory(address)[:BEGIN])
