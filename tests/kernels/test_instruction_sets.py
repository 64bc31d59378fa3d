"""same_bits.cc, compiled and run: for this processor, and for 64-bit ARM in an emulator where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(map(str, (ROOT / "kernels/src").glob("*.cc")))
# As setup.py has them.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", f"-I{ROOT / 'kernels/src'}"]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DOTPROD, NO_DOTPROD = "max", "cortex-a53"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compiles and runs programs as Linux does")


def compiled(compiler: str, out: Path, *flags: str) -> Path:
    program = str(Path(__file__).with_name("same_bits.cc"))
    subprocess.run([compiler, *FLAGS, *flags, program, *SOURCES, "-o", str(out)], check=True)
    return out


def said(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_each_of_this_processor_gives_the_same_bits(tmp_path: Path) -> None:
    program = str(compiled("g++", tmp_path / "same_bits"))
    best = said([program]).removesuffix(" equal")
    order = ["portable", "avx2", "avx512_vnni"] if best != "neon_dotprod" else ["portable", "neon_dotprod"]
    for name in order[: order.index(best) + 1]:
        assert said([program], CORRAL_CPU_OPS_ISA=name) == f"{name} equal"


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_those_of_arm_give_the_same_bits_and_are_chosen_where_they_run(tmp_path: Path) -> None:
    program = str(compiled(ARM_COMPILER, tmp_path / "same_bits", "-static"))
    assert said([ARM_EMULATOR, "-cpu", DOTPROD, program]) == "neon_dotprod equal"
    assert said([ARM_EMULATOR, "-cpu", NO_DOTPROD, program]) == "portable equal"
