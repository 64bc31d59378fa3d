from __future__ import annotations

import json

import pytest

from corral.cli.progress import amount, plain_progress, rate
from corral.cli.tables import Table, print_json, print_table

TABLE = Table(columns=("build", "KL>"), rows=[("a" * 200, "0.0121 ± 0.0004"), ("b", "[bold]0[/bold]")])


def test_a_pipe_gets_whole_rows_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["a" * 200, "0.0121", "±", "0.0004"]
    assert lines[2].split() == ["b", "[bold]0[/bold]"]  # what a cell says is not markup
    assert "\x1b" not in "".join(lines)


def test_a_narrow_terminal_gets_spreads_below_their_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("NO_COLOR", "1")
    print_table(Table(columns=("build", "KL>"), rows=[("int4", "0.0121 ± 0.0004")]))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["int4", "0.0121"], ["±", "0.0004"]]


def test_json_is_standard(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "é", "kl": None})
    assert json.loads(capsys.readouterr().out) == {"name": "é", "kl": None}
    with pytest.raises(ValueError, match="JSON"):
        print_json({"kl": float("nan")})


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (61e9, 120e9, "bytes", "61.0 GB of 120.0 GB"),
        (187e6, 1e9, "parameters", "187.0 M of 1.0 B parameters"),
        (412, 768, "jobs", "412 of 768 jobs"),
        (0, 0, "", ""),
    ],
)
def test_amounts_carry_their_unit(done: float, total: float, unit: str, text: str) -> None:
    assert amount(done, total, unit) == text


def test_a_log_gets_a_line_every_two_seconds_and_none_for_quick_work() -> None:
    now, lines = [0.0], list[str]()
    progress = plain_progress(clock=lambda: now[0], write=lines.append)
    for tick in range(21):
        now[0] = tick / 4
        progress("score", tick, 20, "tokens")
    assert lines == ["score 8 of 20 tokens, 3.0 s left", "score 16 of 20 tokens, 1.0 s left"]


def test_a_logs_line_says_how_fast_it_goes_and_how_long_it_will_take() -> None:
    now, lines = [0.0], list[str]()
    progress = plain_progress(clock=lambda: now[0], write=lines.append)
    for _ in range(2):  # two builds, one after the other
        for tick in range(1, 5):
            now[0] += 1
            progress("check files", tick * 1e9, 4e9, "bytes")
    assert (
        lines
        == [
            "check files 2.0 GB of 4.0 GB, 1.0 GB/s, 2.0 s left",
            "check files 4.0 GB of 4.0 GB, 1.0 GB/s",
        ]
        * 2
    )


def test_what_an_earlier_run_has_done_is_no_speed() -> None:
    now, lines = [0.0], list[str]()
    progress = plain_progress(clock=lambda: now[0], write=lines.append)
    for done in (900e6, 910e6):
        progress("weights", done, 1e9, "parameters")
        now[0] += 10
    progress("weights", 910e6, 1e9, "parameters")
    assert lines[0] == "weights 910.0 M of 1.0 B parameters, 1.0 M parameters/s, 90 s left"


def test_a_rate_carries_its_unit_and_is_left_out_where_it_says_nothing() -> None:
    assert rate("parameters", 187e6) == "187.0 M parameters/s"
    assert rate("bytes", 2e9) == "2.0 GB/s"
    assert rate("bytes", None) == rate("tokens", 5.0) == ""
