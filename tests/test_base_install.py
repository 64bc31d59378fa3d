"""A wheel installed with nothing but base dependencies runs a bundle; torch and onnx are absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from corral.kernels.library import PATH

LIBRARY = PATH.name
ROOT = Path(__file__).parents[1]
FOLDERS: tuple[str, ...] = tuple(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"].values()
)
GENERATE = """
import json, sys
from corral.runtime import LLM, SamplingParams
[completion] = LLM(sys.argv[1]).generate([[1, 2, 3]], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
print(json.dumps(completion.token_ids))
"""


def run(command: Sequence[str | Path], cwd: Path, code: int = 0) -> str:
    """Run `command`, expect exit `code`, return its output."""
    # Without PYTHONPATH, which could lend what is not installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build leaves folders in its source tree.
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", LIBRARY))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", "."], source)
    [built] = (source / "dist").glob("corral-*.whl")
    return built


@pytest.fixture(scope="module")
def base_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh virtual environment that holds the wheel and its base dependencies."""
    directory = tmp_path_factory.mktemp("base")
    venv.create(directory / "venv", with_pip=True)
    binaries = directory / "venv/bin"
    run([binaries / "python", "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel], directory)
    return binaries


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "scout-int4"
    command = ["compile", str(tiny_checkpoint("scout")), "-o", str(out), "--target", "cpu"]
    command += ["--weights", "int4", "--group-size", "32", "--kernels", "corral" if PATH.is_file() else "stock"]
    run([Path(sys.executable).with_name("corral"), *command], out.parent)
    return out


def test_wheel_holds_every_file_of_the_layers(wheel: Path) -> None:
    expected = {
        f"corral/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.parent != ROOT / "kernels/src"
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("corral-")}
    assert packed == expected
    assert "corral/__init__.py" not in packed  # a namespace


def test_compiler_packages_are_absent(base_bin: Path, tmp_path: Path) -> None:
    listed = json.loads(run([base_bin / "python", "-m", "pip", "list", "--format", "json"], tmp_path))
    names = {package["name"].lower() for package in listed}
    assert {"corral", "onnxruntime", "numpy", "tokenizers"} <= names
    assert not names & {"torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "transformers", "ml-dtypes"}


def test_bundle_generates_the_same_tokens_there_as_here(base_bin: Path, bundle: Path, tmp_path: Path) -> None:
    here = json.loads(run([sys.executable, "-c", GENERATE, bundle], tmp_path))
    there = json.loads(run([base_bin / "python", "-c", GENERATE, bundle], tmp_path))
    assert len(here) == 24  # past a chunk boundary
    assert there == here


def test_commands_that_need_no_compiler_work(base_bin: Path, bundle: Path, tmp_path: Path) -> None:
    assert "compile" in run([base_bin / "corral", "--help"], tmp_path)
    assert run([base_bin / "corral", "run", bundle, "def f(", "--max-tokens", "4"], tmp_path)
    assert "int4" in run([base_bin / "corral", "inspect", bundle], tmp_path)


def test_compile_says_what_to_install(base_bin: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command: list[str | Path] = [base_bin / "corral", "compile", tiny_checkpoint("scout"), "-o", tmp_path / "out"]
    message = run(command, tmp_path, code=3)
    assert "corral[compile]" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
