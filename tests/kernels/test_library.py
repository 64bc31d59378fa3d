"""The library as a file: how it is built, found and refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from corral.kernels import find_library
from corral.kernels.library import PATH
from corral.spec.cpu_ops import VERSION
from corral.spec.errors import EnvironmentProblem

ROOT = Path(__file__).parents[2]
REMEDY = "Install a C\\+\\+ compiler .* or compile the checkpoint with `--kernels stock`"
pytestmark = pytest.mark.usefixtures("cpu_kernels")


def build(source: Path, out: Path, **environment: str) -> str:
    """Run setup.py's build of the library on a copy of the sources; returns what it printed."""
    shutil.copytree(ROOT / "kernels/src", source / "kernels/src")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "temporary")]
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_what_is_installed_loads_and_is_of_this_version() -> None:
    library = find_library()
    assert library.path == PATH
    assert library.version == VERSION
    assert library.instruction_set in ("portable", "avx2", "avx512_vnni")


def test_without_a_compiler_the_installation_goes_on_without_the_library(tmp_path: Path) -> None:
    said = build(tmp_path / "source", tmp_path / "out", CC="no-such-compiler", CXX="no-such-compiler")
    assert "no-such-compiler" in said
    assert not list((tmp_path / "out").rglob("*corral_cpu_ops*"))
    with pytest.raises(EnvironmentProblem, match=f"are not installed .*{REMEDY}"):
        find_library(tmp_path / "out/corral/kernels" / PATH.name)


@pytest.mark.parametrize("share", [0, 0.00001, 0.0001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_library_is_refused(tmp_path: Path, share: float) -> None:
    whole = PATH.read_bytes()
    (tmp_path / PATH.name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EnvironmentProblem, match=f"do not load from .*{REMEDY}"):
        find_library(tmp_path / PATH.name)


@pytest.mark.skipif(sys.platform != "linux", reason="edits an ELF header")
def test_a_library_for_another_processor_is_refused(tmp_path: Path) -> None:
    data = bytearray(PATH.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")  # RISC-V
    (tmp_path / PATH.name).write_bytes(data)
    with pytest.raises(EnvironmentProblem, match=f"do not load from .*{REMEDY}"):
        find_library(tmp_path / PATH.name)


def test_something_else_by_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text(
        "no library at all, but longer than a header of sixty-four bytes, which is read first"
    )
    with pytest.raises(EnvironmentProblem, match="do not load from"):
        find_library(tmp_path / "text.so")
    import onnxruntime

    [another] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime_providers_shared.so")
    with pytest.raises(EnvironmentProblem, match="corral_cpu_ops_version"):
        find_library(another)


@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("g++"), reason="needs g++ and nm")
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512_vnni"])
def test_kernel_files_define_nothing_that_others_may_define_too(tmp_path: Path, kernels: str) -> None:
    """An inline function of two files is linked once: from a kernel file, it would hold instructions not every CPU has."""
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden"]  # nothing is inlined away
    subprocess.run(["g++", *flags, "-c", ROOT / f"kernels/src/{kernels}.cc", "-o", tmp_path / "kernels.o"], check=True)
    listed = subprocess.run(["nm", tmp_path / "kernels.o"], capture_output=True, text=True, check=True).stdout
    kinds = [line.split()[-2] for line in listed.splitlines()]
    assert "D" in kinds  # the table of its functions
    assert not {"W", "V", "u"} & set(kinds), listed
