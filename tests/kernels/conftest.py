"""What tests of the CPU kernels share: sessions with the library, and its instruction sets one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import onnxruntime as ort
import pytest
from onnx import ModelProto

from corral.kernels import find_library

VARIABLE = "CORRAL_CPU_OPS_ISA"
LIBRARY = "CORRAL_TEST_LIBRARY"  # test_sanitizers.py runs the tests again, with another build

Forced = Callable[[str], AbstractContextManager[None]]


@contextmanager
def _forced(instruction_set: str) -> Iterator[None]:
    os.environ[VARIABLE] = instruction_set
    try:
        if find_library().instruction_set != instruction_set:
            pytest.skip(f"this processor has no {instruction_set}")
        yield
    finally:
        del os.environ[VARIABLE]


@pytest.fixture(scope="session")
def forced() -> Forced:
    """Sessions opened inside `forced(name)` compute with these kernels; skips the test where the processor lacks them."""
    return _forced


@pytest.fixture(scope="session")
def open_session() -> Callable[..., ort.InferenceSession]:
    """`open_session(model, threads=1)` -> a session that knows corral's own operators."""

    def open_(model: ModelProto, threads: int = 1) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = LIBRARY not in os.environ  # where a sanitizer is to see each tensor's end
        options.register_custom_ops_library(os.environ.get(LIBRARY) or str(find_library().path))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return open_
