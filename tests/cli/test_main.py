from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from corral.cli import failure
from corral.cli.failure import explain
from corral.cli.main import COMMANDS, main
from corral.spec.errors import CheckFailed, CorralError, EnvironmentProblem, InputError

Corral = Callable[..., Any]
HEAVY = {"numpy", "torch", "onnxruntime", "onnx", "tokenizers", "rich", "jinja2"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--help"], ["validate", "--help"], ["completion", "zsh"]]
)
def test_help_and_completion_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom corral.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stderr.split()) & HEAVY
    assert done.stdout


def test_help_lists_every_command_with_a_line(corral: Corral) -> None:
    lines = {
        line.split()[0]: line.split()[1:] for line in corral("--help").stdout.splitlines() if line.startswith("  ")
    }
    assert all(len(lines[name]) > 2 for name in COMMANDS)


def test_no_argument_shows_help(corral: Corral) -> None:
    assert corral().stdout == corral("--help").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_option(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.help
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_every_recipe_key_is_an_option(corral: Corral) -> None:
    import dataclasses

    from corral.spec.recipe import Recipe

    shown = corral("compile", "--help").stdout
    keys = {field.name for field in dataclasses.fields(Recipe)} - {"rules"}  # which is a list, for files
    assert all(f"--{key.replace('_', '-')} " in shown for key in keys)


def test_version(corral: Corral) -> None:
    assert corral("--version").stdout.startswith("corral 0.")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compilee"], "No such command 'compilee'. Run `corral --help`"),
        (["compile", "--foo"], "No such option '--foo'."),
        (["compile"], "Missing argument 'CHECKPOINT'. Run `corral compile --help`"),
        (["compile", "x", "-o", "y", "--weights", "int5"], 'weights "int5" are not known; expected one of fp32'),
        (["compile", "x", "-o", "y", "--group-size", "7"], "group_size is 7, expected one of 32, 64, 128"),
        (["compile", "x"], "expected -o OUT, or --discard to write nothing; got neither."),
        (["compile", "x", "-o", "y", "--discard"], "expected -o OUT, or --discard to write nothing; got both."),
        (["compile", "x", "-o", "y", "--ray", "head"], '--ray is "head", expected HOST:PORT of a cluster'),
        (["compile", "x", "--discard", "--ray", "head"], '--ray is "head", expected HOST:PORT of a cluster'),
        (["inspect", "nowhere"], "nowhere does not exist; expected a bundle made by `corral compile`"),
        (["validate", "a", "b"], "expected --text FILE or --token-ids FILE, got neither"),
    ],
)
def test_the_users_mistakes_are_one_line_and_exit_code_2(corral: Corral, arguments: list[str], says: str) -> None:
    result = corral(*arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert result.stdout == ""


def raising(error: BaseException) -> Callable[[str], Any]:
    def command(name: str) -> Any:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (CheckFailed("too far"), 1, "error: too far\n"),
        (InputError("a\n   b"), 2, "error: a b\n"),
        (EnvironmentProblem("no room"), 3, "error: no room\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, '`pip install "corral[compile]"`'),
        (ModuleNotFoundError("", name="onnx.helper"), 3, "the Python package onnx is missing"),
        (ModuleNotFoundError("", name="onnxruntime"), 3, '`pip install "corral"`'),
        (MemoryError(), 3, "memory ran out"),
        (OSError(errno.ENOSPC, "full", "out/x"), 3, "out/x: the disk is full"),
        (PermissionError(errno.EACCES, "no", "out"), 3, "out: permission denied"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C.\n"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    corral: Corral, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.setattr("corral.cli.main.importlib.import_module", raising(error))
    assert says in corral("doctor", code=code).stderr


@pytest.mark.parametrize("error", [AssertionError("ours"), ModuleNotFoundError("", name="corral.oops"), OSError("odd")])
def test_a_defect_of_corral_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None


def test_every_error_of_spec_is_explained() -> None:
    kinds: list[type[CorralError]] = [CorralError, *CorralError.__subclasses__()]
    assert all((told := explain(kind("x"))) is not None and told.exit_code == kind.exit_code for kind in kinds)


def test_every_package_that_can_be_missing_has_an_installer() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {f"corral[{extra}]": project["optional-dependencies"][extra] for extra in ("compile", "ray")}
    asked = {"corral": project["dependencies"], **extras}
    for extra, requirements in asked.items():
        modules = {requirement.split(">=")[0].replace("-", "_") for requirement in requirements} - {"click"}
        assert {module for module, by in failure.INSTALLED_BY.items() if by == extra} == modules


def test_messages_are_wrapped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = failure.Failure("word " * 60, 2)
    failure.show(long)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    failure.show(long)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith("       word") for line in lines[1:])


def test_a_reader_that_leaves_is_no_error() -> None:
    # A reader that is gone before anything is written: writing fails with EPIPE at the latest when the interpreter ends.
    code = "import time\nfrom corral.cli.main import main\ntime.sleep(0.3)\nmain(['completion', 'bash'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_corral(corral: Corral, shell: str) -> None:
    assert "_CORRAL_COMPLETE" in corral("completion", shell).stdout


def test_completion_completes_commands(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CORRAL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "corral comp")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert corral().stdout.split() == ["plain,compile", "plain,completion"]
