"""The tests of all operators once more, with the kernels built for AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
TESTS = [f"tests/kernels/test_{name}.py" for name in ("operators", "attention", "add_norm")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(not shutil.which("g++") or sys.platform != "linux", reason="needs g++ and its sanitizers on Linux")
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    sources = sorted(map(str, (ROOT / "kernels/src").glob("*.cc")))
    subprocess.run(["g++", *FLAGS, *SANITIZE, *sources, "-o", library, "-lm"], check=True)
    # The interpreter is not built for them, so their libraries come first by hand; leaks of others are not ours to find.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "CORRAL_TEST_LIBRARY": str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
