"""`corral(...)` runs a command in this process; `parsed(...)` takes a page apart."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from corral.cli.main import main


@pytest.fixture(scope="session")
def corral() -> Callable[..., Result]:
    """`corral("inspect", bundle, code=0)`; a code other than expected fails with everything that was printed."""

    def run(*arguments: Any, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


class Page(HTMLParser):
    """Its elements, the text in them, and the JSON it carries."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._script, self._id = "", "", ""
        self.data: dict[str, str] = {}  # the JSON it carries, by id
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._script = dict(attributes).get("type") or tag
        self._id = dict(attributes).get("id") or ""
        self.text += " " if tag == "td" else ""

    def handle_data(self, data: str) -> None:
        if self._script == "application/json":
            self.data[self._id] = self.data.get(self._id, "") + data
        elif self._script not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


@pytest.fixture(scope="session")
def parsed() -> Callable[[str], Page]:
    """`parsed(html)` -> its elements, its text and its data."""
    return Page


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
