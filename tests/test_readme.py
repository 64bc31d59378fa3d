"""README's commands do what README says: its blocks are run, top to bottom, in an empty directory.

A ```bash block holds `make TARGET` (looked up in the Makefile) and `corral …` (run); a ```python block is run.
A comment `<!-- not run: reason -->` in front of a block keeps it from being run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n+)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    mark: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continuations joined, comments dropped."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def blocks() -> list[Block]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [Block(m["language"], m["body"], m["mark"] or "") for m in BLOCK.finditer(readme)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def test_every_block_can_be_checked() -> None:
    targets = make_targets()
    for block in blocks():
        if block.mark.startswith("not run: "):
            continue
        assert block.language in ("bash", "python", "text"), block.body
        for command in block.commands if block.language == "bash" else []:
            word, _, rest = command.partition(" ")
            assert word in ("make", "corral"), f"README: {command!r} is not checked by any test"
            assert word != "make" or rest.split()[0] in targets, f"README: the Makefile has no target for {command!r}"


def test_the_speed_table_is_that_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- speed table -->\n")[2].partition("<!-- end of speed table -->")[0]
    command = [sys.executable, "benchmarks/cpu_summary.py", "--table"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == made, "run python benchmarks/cpu_summary.py"


def test_commands_and_code_run(tmp_path: Path) -> None:
    demo = ROOT / "demo/demo-scout"
    (tmp_path / "demo").mkdir()
    shutil.copytree(demo, tmp_path / "demo/demo-scout")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = []
    for block in blocks():
        if block.mark.startswith("not run: ") or block.language == "text":
            continue
        corral = [["bash", "-c", command] for command in block.commands if command.startswith("corral ")]
        for command in corral if block.language == "bash" else [[sys.executable, "-c", block.body]]:
            done = subprocess.run(
                command,
                cwd=tmp_path,
                env=os.environ | {"PATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,
            )
            if done.returncode:
                pytest.fail(f"README: {command[-1]}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
            ran.append(command[-1])
    for word in ("corral compile", "corral run", "corral validate", "LLM("):
        assert any(word in command for command in ran), f"README shows no {word} that this test runs"
