"""The project's own promises: packaging, links, layers, light imports, and what may not stand in any file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# corral.<folder> -> folder
LAYERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]

# Quoted from elsewhere, or data: their words are not ours.
QUOTED = (
    "LICENSE",
    "LICENSES/",
    "demo/demo-scout/heldout.txt",
    "graphs/calibrate/python-library.txt",
    "demo/demo-scout/tokenizer.json",
)
# Written so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"/(?:work|root|opt|home|Users)/[\w.]"),
    "a package host": re.compile(
        r"py[p]i\b|pythonhosted[.]org|download[.]pytorch|anaconda[.]org|conda[-]forge|npmjs[.]|crates[.]io", re.I
    ),
}


def tracked_files() -> list[Path]:
    """What git tracks; before the first commit, what it would."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def listed(*options: str) -> list[Path]:
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", *options]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [ROOT / name for name in out.split("\0") if name]

    return listed() or listed("--others", "--exclude-standard")


def python_modules_loaded(code: str) -> set[str]:
    """Top-level names in sys.modules after `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_every_sub_package_is_in_the_package_list() -> None:
    found = {
        ".".join(("corral", *init.parent.relative_to(ROOT).parts))
        for folder in LAYERS.values()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_module_is_in_a_package() -> None:
    lost = [
        str(module.relative_to(ROOT))
        for folder in LAYERS.values()
        for module in (ROOT / folder).rglob("*.py")
        if not (module.parent / "__init__.py").exists()
    ]
    assert not lost, "these folders lack an __init__.py and would be missing from the wheel"


def test_every_layer_is_linked_under_src() -> None:
    links = {path.name: os.readlink(path) for path in (ROOT / "src/corral").iterdir()}
    assert links == {folder: f"../../{folder}" for folder in LAYERS.values()}
    assert set(LAYERS) == {f"corral.{folder}" for folder in LAYERS.values()}


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_import_contracts_name_every_layer() -> None:
    linter = PYPROJECT["tool"]["importlinter"]
    assert set(linter["root_packages"]) == set(LAYERS)
    going_down = next(contract for contract in linter["contracts"] if contract["type"] == "layers")
    # runtime stands apart: its own contract forbids it everything but spec and kernels.
    assert set(going_down["layers"]) == set(LAYERS) - {"corral.runtime"}
    alone = next(c for c in linter["contracts"] if c.get("source_modules") == ["corral.runtime"])
    assert set(alone["forbidden_modules"]) >= set(LAYERS) - {"corral.runtime", "corral.kernels", "corral.spec"} | {
        "torch",
        "onnx",
    }


def test_runtime_loads_neither_torch_nor_onnx() -> None:
    loaded = python_modules_loaded("from corral.runtime import LLM, SamplingParams, Tokenizer")
    assert "corral" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors"}


def test_help_loads_nothing_heavy() -> None:
    run_help = (
        "import corral.cli.main\ntry: corral.cli.main.main(['--help'])\nexcept SystemExit as end: assert not end.code"
    )
    loaded = python_modules_loaded(run_help)
    assert "click" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers"}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(QUOTED) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights
        lines = enumerate(text.splitlines(), 1)
        found += [f"{name}:{number}: {line.strip()[:100]}" for number, line in lines if FORBIDDEN[what].search(line)]
    assert not found, f"{what} is named"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "make test"
    assert re.search(r"^```bash\n(?:.*\n)*?make test\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "format"])
def test_makefile_has(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} has no line in constraints.txt"
        assert version in requirement.specifier, f"{requirement} does not admit the {version} of constraints.txt"


def test_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PYPROJECT['project']['version'])}\]", changelog, re.M)


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "demo").rglob("*.md")]
    broken, seen = [], 0
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            seen += 1
            if "://" not in link and not (document.parent / link).exists():
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken
    assert seen > 10


def test_every_command_and_option_is_documented() -> None:
    import click

    from corral.cli.main import main

    assert isinstance(main, click.Group)
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    context = click.Context(main)
    names = main.list_commands(context)
    assert set(re.findall(r"^## `corral (\w+)", text, re.M)) == set(names)
    commands = {name: main.get_command(context, name) for name in names}
    options = {
        f"{name} {option}"
        for name, command in commands.items()
        for parameter in (command.params if command else ())
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    assert not {option for option in options if option.split()[1] not in text}
