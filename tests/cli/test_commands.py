from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Corral = Callable[..., Any]
TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]

TEXT = "for name, value in sorted(headers.items()):\n    print(name, value)\n" * 4


@pytest.fixture
def bundle(tiny_bundle: TinyBundle) -> Path:
    return tiny_bundle("scout", "cpu", "int4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def bare(bundle: Path, tmp_path: Path) -> Path:
    """The bundle without tokenizer."""
    out = tmp_path / "bare"
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": None, "chat_template": None}))
    return out


def test_compile_reports_coverage_and_the_next_command(
    corral: Corral, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text('weights = "int8"\ngroup_size = 64\n')
    shown = corral("compile", tiny_checkpoint("scout"), "-o", out, "--recipe", recipe, "--group-size", 32).stdout
    assert "int8 g32" in shown  # the option beats the file, the file beats the default
    assert f"next: corral run {out}" in shown
    again = corral("compile", tiny_checkpoint("scout"), "-o", out, "--group-size", 32, code=2)
    assert "--fresh" in again.stderr
    data = json.loads(
        corral("compile", tiny_checkpoint("scout"), "-o", out, "--fresh", "--group-size", 32, "--json").stdout
    )
    assert data["recipe"].items() >= {"target": "cpu", "weights": "int4", "method": "rtn", "group_size": 32}.items()
    assert data["bytes"] == sum(f.stat().st_size for f in out.iterdir() if f.name != "manifest.json")


def test_run_takes_a_prompt_up_where_a_file_has_it(corral: Corral, bundle: Path, tmp_path: Path) -> None:
    def run(*options: Any) -> dict[str, Any]:
        shown = corral("run", bundle, TEXT, "--max-tokens", 8, "--ignore-eos", "--json", *options).stdout
        return json.loads(shown)

    plain, file = run(), tmp_path / "prefix"
    first, second = run("--prefix-cache", file), run("--prefix-cache", file)
    assert plain["token_ids"] == first["token_ids"] == second["token_ids"]
    assert [data["timings"]["cached_tokens"] > 0 for data in (plain, first, second)] == [False, False, True]
    assert "no such directory" in corral("run", bundle, TEXT, "--prefix-cache", tmp_path / "a" / "b", code=2).stderr
    file.write_bytes(file.read_bytes()[:-1])
    assert "incomplete" in corral("run", bundle, TEXT, "--prefix-cache", file, code=2).stderr


def test_run_answers_a_prompt_that_is_too_short_to_keep(corral: Corral, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefix"
    done = corral("run", bundle, "for", "--max-tokens", 2, "--json", "--prefix-cache", file)
    assert json.loads(done.stdout)["token_ids"]
    assert f"{file} is not written" in done.stderr
    assert not file.exists()


def test_run_guesses_tokens(corral: Corral, bundle: Path) -> None:
    base = ("run", bundle, TEXT, "--max-tokens", 24, "--ignore-eos")
    plain = corral(*base).stdout
    assert corral(*base, "--prompt-lookup", "--speculative-tokens", 3).stdout == plain
    assert corral(*base, "--draft", bundle).stdout == plain


def test_ctrl_c_says_how_far_it_came_and_the_same_command_goes_on(
    corral: Corral, tiny_checkpoint: TinyCheckpoint, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral.graphs.execute.executors import RunJob

    arguments = ("compile", tiny_checkpoint("scout"), "-o", tmp_path / "out", "--group-size", 32, "--jobs", 1)
    left = iter(range(7))
    run = RunJob.__call__
    # Python ignores the signal where it was ignored when it began, as in a shell's background jobs.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(self: RunJob, job: Any) -> tuple[str, ...]:
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return run(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(RunJob, "__call__", interrupted)
        stopped = corral(*arguments, code=130).stderr
    signal.signal(signal.SIGINT, before)
    words = stopped.splitlines()[-1]
    assert re.fullmatch(r"stopped after 7 of \d+ jobs; the same command goes on from here\.", words)
    corral(*arguments)
    assert (tmp_path / "out" / "weights-00000.bin").read_bytes() == (bundle / "weights-00000.bin").read_bytes()


def test_a_rehearsal_prints_what_would_have_been_written(
    corral: Corral, tiny_checkpoint: TinyCheckpoint, bundle: Path
) -> None:
    arguments = ("compile", tiny_checkpoint("scout"), "--discard", "--group-size", 32)
    data = json.loads(corral(*arguments, "--json").stdout)
    assert data["bytes"] == sum(path.stat().st_size for path in bundle.glob("weights-*.bin"))
    assert data["parameters"] > 100_000
    assert data["seconds"] > 0
    shown = corral(*arguments).stdout
    assert all(shard["name"] in shown and shard["sha256"] in shown for shard in data["shards"])
    assert "nothing was written" in shown


def test_compile_says_what_was_kept_as_published_and_what_was_quantized_again(
    corral: Corral, published_checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, _ = published_checkpoint("two_layers", "int4 g32")
    out = tmp_path / "out"
    kept = corral("compile", checkpoint, "-o", out, "--group-size", 32).stdout
    assert re.search(r"experts +int4 g32, as published", kept)
    assert re.search(r"attention +int4 g32 +\d", kept)
    refused = corral("compile", checkpoint, "-o", tmp_path / "again", "--weights", "int8", "--group-size", 32, code=2)
    assert "--requantize" in refused.stderr
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('weights = "int8"\ngroup_size = 32\nrequantize = true\n')
    again = corral("compile", checkpoint, "-o", tmp_path / "again", "--recipe", recipe).stdout
    assert re.search(r"experts +int8 g32, from int4 g32", again)


def test_stages_one_by_one_end_in_a_bundle_that_runs(
    corral: Corral, tiny_checkpoint: TinyCheckpoint, bundle: Path, tmp_path: Path
) -> None:
    exported, quantized, ready = (tmp_path / name for name in ("exported", "quantized", "ready"))
    assert f"next: corral quantize {exported}" in corral("export", tiny_checkpoint("scout"), "-o", exported).stdout
    shown = corral("quantize", exported, "-o", quantized, "--weights", "int4", "--group-size", 32).stdout
    assert f"next: corral lower {quantized}" in shown
    assert f"next: corral run {ready}" in corral("lower", quantized, "-o", ready).stdout
    assert (
        corral("run", ready, "def f(", "--max-tokens", 8).stdout
        == corral("run", bundle, "def f(", "--max-tokens", 8).stdout
    )
    assert (ready / "weights-00000.bin").read_bytes() == (bundle / "weights-00000.bin").read_bytes()


def test_run_prints_the_completion_and_nothing_else(corral: Corral, bundle: Path) -> None:
    shown = corral("run", bundle, "def f(", "--max-tokens", 12, "--ignore-eos").stdout
    data = json.loads(corral("run", bundle, "def f(", "--max-tokens", 12, "--ignore-eos", "--json").stdout)
    assert shown == data["text"] + "\n"
    assert len(data["token_ids"]) == 12
    assert data["finish_reason"] == "length"
    assert data["timings"]["first_token"] > 0


def test_run_reads_a_prompt_from_stdin(corral: Corral, bundle: Path) -> None:
    assert (
        corral("run", bundle, "-", "--max-tokens", 8, stdin="def f(").stdout
        == corral("run", bundle, "def f(", "--max-tokens", 8).stdout
    )


def test_run_with_the_chat_template_differs(corral: Corral, bundle: Path) -> None:
    raw, chat = (json.loads(corral("run", bundle, "hi", flag, "--json").stdout) for flag in ("--raw", "--chat"))
    assert len(chat["prompt_token_ids"]) > len(raw["prompt_token_ids"])


def test_same_seed_same_text(corral: Corral, bundle: Path) -> None:
    options = ("--temperature", 1.0, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--seed", 7, "--json")
    first, second = (json.loads(corral("run", bundle, "x", *options).stdout)["token_ids"] for _ in range(2))
    assert first == second


def test_run_without_tokenizer_is_refused(corral: Corral, bare: Path) -> None:
    assert "has no tokenizer" in corral("run", bare, "hi", code=2).stderr


def test_chat_takes_each_line_of_a_pipe_as_a_turn(corral: Corral, bundle: Path) -> None:
    options = ("--max-tokens", 6, "--temperature", 0, "--ignore-eos")
    once = corral("chat", bundle, *options, stdin="hello\n").stdout
    both = corral("chat", bundle, *options, stdin="hello\n\n/reset\nhello\n/exit\nnever\n").stdout
    assert both == once * 2
    remembering = corral("chat", bundle, *options, stdin="hello\nhello\n").stdout
    assert remembering.startswith(once) and remembering != once * 2
    assert "/foo is not known" in corral("chat", bundle, stdin="/foo\n").stderr


def test_chat_without_template_says_so_before_anybody_types(corral: Corral, bare: Path) -> None:
    assert "has no tokenizer" in corral("chat", bare, stdin="", code=2).stderr


def test_validate_prints_a_table_and_json(
    corral: Corral, tiny_checkpoint: TinyCheckpoint, bundle: Path, text: Path
) -> None:
    arguments = ("validate", tiny_checkpoint("scout"), bundle, "--text", text, "--window", 64, "--repeats", 1)
    shown = corral(*arguments).stdout
    assert "(PyTorch)" in shown and bundle.name in shown
    assert f"{len(TEXT)} predictions in 5 windows of 64 tokens" in shown
    [candidate] = json.loads(corral(*arguments, "--json").stdout)["candidates"]
    assert {"mean", "stderr", "p99"} <= candidate["kl"].keys()


def test_a_broken_gate_shows_the_table_and_exits_1(
    corral: Corral, tiny_bundle: TinyBundle, bundle: Path, text: Path
) -> None:
    fp32 = tiny_bundle("scout", "cpu", "fp32")
    arguments = ("validate", fp32, bundle, "--text", text, "--window", 64, "--repeats", 1)
    result = corral(*arguments, "--max-kl", 1e-9, "--json", code=1)
    assert "mean KL divergence is" in result.stderr
    assert json.loads(result.stdout)["candidates"][0]["kl"]["mean"] > 1e-9
    corral(*arguments, "--max-kl", 10, "--min-top1", 0, "--max-perplexity-ratio", 10)


def test_validate_takes_token_ids(corral: Corral, bare: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(200))
    data = json.loads(
        corral("validate", bare, bare, "--token-ids", tmp_path / "ids.npy", "--repeats", 1, "--json").stdout
    )
    assert data["measured"]["predictions"] == 199
    assert data["candidates"][0]["kl"]["max"] == 0.0


def test_inspect_says_what_a_bundle_is(corral: Corral, bundle: Path) -> None:
    shown = corral("inspect", bundle).stdout
    for fact in ("ready", "5 layers (4 rope, 1 nope), 8 experts", "int4 g32", "tokenizer.json", f"corral run {bundle}"):
        assert fact in shown
    data = json.loads(corral("inspect", bundle, "--json").stdout)
    assert data["recipe"]["weights"] == "int4"
    assert data["model"]["vocab_size"] == 320


def test_inspect_plan_leads_from_stored_tensor_to_checkpoint(corral: Corral, bundle: Path) -> None:
    name = next(
        e["name"] for e in json.loads(corral("inspect", bundle, "--plan", "--json").stdout) if "codes" in e["name"]
    )
    shown = corral("inspect", "--plan", bundle, name).stdout
    assert "rtn bits=4 group_size=32 -> codes" in shown
    assert "<- model.layers." in shown
    [entry] = json.loads(corral("inspect", bundle, "--plan", name, "--json").stdout)
    assert entry["offset"] % 4096 == 0
    several = json.loads(corral("inspect", bundle, "--plan", "layers.0.*", "--json").stdout)
    assert len(several) > 3 and all("layers.0." in e["name"] for e in several)
    assert 'has no tensor "nothing"' in corral("inspect", bundle, "--plan", "nothing", code=2).stderr


def test_inspect_name_without_plan_is_refused(corral: Corral, bundle: Path) -> None:
    assert "belongs to --plan" in corral("inspect", bundle, "x", code=2).stderr


def test_inspect_graph_counts_operators_by_domain(corral: Corral, bundle: Path) -> None:
    [graph] = json.loads(corral("inspect", bundle, "--graph", "--json").stdout)
    assert graph["operators"]["com.microsoft::QMoE"] == 5
    assert "QMoE" in corral("inspect", bundle, "--graph").stdout


def test_inspect_inputs_asks_for_polygraphy_and_a_file(
    corral: Corral, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"
    assert "Leave the other options out" in corral("inspect", bundle, "--files", "--inputs", out, code=2).stderr
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    assert 'Run `pip install "corral[polygraphy]"`' in corral("inspect", bundle, "--inputs", out, code=3).stderr
    assert list(tmp_path.glob("step*")) == []


def test_inspect_coverage_and_files_add_up(corral: Corral, bundle: Path) -> None:
    files = json.loads(corral("inspect", bundle, "--files", "--json").stdout)
    assert {f["path"]: f["bytes"] for f in files} == {
        f.name: f.stat().st_size for f in bundle.iterdir() if f.name != "manifest.json"
    }
    coverage = json.loads(corral("inspect", bundle, "--coverage", "--json").stdout)
    weights = (bundle / "weights-00000.bin").stat().st_size
    assert 0 <= weights - sum(c["bytes"] for c in coverage) < weights


def test_inspect_verify_finds_a_flipped_byte(corral: Corral, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert "every file is as the manifest says" in corral("inspect", copy, "--verify").stdout
    data = bytearray((copy / "weights-00000.bin").read_bytes())
    data[1000] ^= 1
    (copy / "weights-00000.bin").write_bytes(data)
    assert "weights-00000.bin has SHA-256" in corral("inspect", copy, "--verify", code=2).stderr


def test_tune_writes_a_recipe_that_compiles(corral: Corral, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    recipe, checkpoint = tmp_path / "tuned.toml", tiny_checkpoint("two_layers")
    arguments = ("tune", checkpoint, "-o", recipe, "--size", "0.5MB", "--tokens", 512, "--calibration-tokens", 1024)
    shown = corral(*arguments).stdout
    assert "KL of the weights together" in shown and f"--recipe {recipe}" in shown
    text = recipe.read_text()
    assert text.startswith("# Chosen by corral tune for at most 500,000 bytes.\n# KL of the weights together: ")
    # What every rule costs, and what none names: together that is the table on the screen.
    lines = text.splitlines()
    rules = [line for line in lines if line.startswith("  { matrices")]
    assert len(rules) > 1 and all(re.search(r"  # KL \S+, \S+ k?B( in 2 layers)?$", rule) for rule in rules)
    (rest,) = (line for line in lines if line.startswith("# So is stored what no rule names: KL "))
    assert "in" in rest
    bundle = json.loads(corral("compile", checkpoint, "-o", tmp_path / "out", "--recipe", recipe, "--json").stdout)
    assert bundle["bytes"] <= 500_000
    assert "is there already" in corral(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ([], "expected one of --budget NATS-kl, --size BYTES and --tokens-per-second N, got none"),
        (["--size", "1GB", "--budget", "1-kl"], "got --budget and --size"),
        (["--budget", "0.01"], '--budget is "0.01", expected a number above 0 with its unit, such as 0.01-kl'),
        (["--size", "10"], '--size is "10"'),
        (["--size", "0MB"], '--size is "0MB"'),
        (["--size", "GB"], '--size is "GB"'),
        (["--tokens-per-second", "-1"], '--tokens-per-second is "-1.0"'),
        (["--tokens-per-second", "nan"], '--tokens-per-second is "nan"'),
    ],
)
def test_budgets_that_are_none(corral: Corral, tmp_path: Path, budget: list[str], says: str) -> None:
    assert says in corral("tune", tmp_path, "-o", tmp_path / "tuned.toml", *budget, code=2).stderr
