from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.spec.errors import InputError
from corral.validate import compare
from corral.validate.comparison import check_comparable

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]

TEXT = "def read_header(line):\n    name, _, value = line.partition(':')\n    return name.strip(), value.strip()\n" * 3


def test_bundles_are_measured_against_the_pytorch_model(
    tiny_checkpoint: TinyCheckpoint, tiny_bundle: TinyBundle
) -> None:
    bundles = [tiny_bundle("scout", "cpu", weights) for weights in ("fp32", "int8", "int4")]
    report = compare(tiny_checkpoint("scout"), bundles, [TEXT], window=64, repeats=2, decode_tokens=4)
    assert report.measured.predictions == len(TEXT)  # a byte-level tokenizer, and BOS in front of each window
    assert report.measured.windows == -(-len(TEXT) // 63)
    fp32, int8, int4 = (candidate.accuracy for candidate in report.candidates)
    # float32 rounding only: logits a part in a million apart
    assert fp32.kl.max < 1e-10
    assert fp32.top1_agreement.mean == 1.0
    assert fp32.perplexity_ratio.mean == pytest.approx(1.0, abs=1e-6)
    assert fp32.kl.mean < int8.kl.mean < int4.kl.mean < 1.0
    assert int8.top1_agreement.mean > int4.top1_agreement.mean
    sizes = [candidate.bytes for candidate in report.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert report.reference.latency is None
    assert all(c.latency and c.latency.tokens_per_second.n == 2 for c in report.candidates)


def test_report_as_json_has_the_promised_keys(tiny_bundle: TinyBundle) -> None:
    fp32, int4 = tiny_bundle("scout", "cpu", "fp32"), tiny_bundle("scout", "cpu", "int4")
    report = compare(fp32, [int4], [TEXT], predictions=100, window=64, repeats=1, decode_tokens=4)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    reference, [candidate] = data["reference"], data["candidates"]
    assert (reference["name"], candidate["name"]) == (fp32.name, int4.name)
    assert candidate["kl"].keys() == {"mean", "stderr", "p50", "p95", "p99", "max"}
    shared = {"name", "bytes", "perplexity", "tokens_per_second", "time_to_first_token"}
    assert shared <= reference.keys()
    assert shared | {"top1_agreement", "top5_agreement", "perplexity_ratio"} <= candidate.keys()
    assert candidate["tokens_per_second_spread"].keys() == {"min", "max", "p25", "p75", "n"}
    assert data["measured"]["predictions"] == 100
    assert candidate["between_tokens"]["n"] == 3 and candidate["between_tokens"]["p99"] is None
    assert candidate["greedy_divergence"].keys() == {"alike", "tokens", "median"}


def test_a_model_without_tokenizer_is_measured_on_token_ids(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    bundle = strip_tokenizer(tiny_bundle("scout", "cpu", "fp32"), tmp_path / "bare")
    ids = np.random.default_rng(0).integers(0, 255, 100).tolist()
    report = compare(bundle, [bundle], token_ids=ids, window=50, repeats=1, decode_tokens=4)
    assert report.measured.predictions == 98  # no BOS was given, so none is added
    assert report.candidates[0].accuracy.kl.max == 0.0
    with pytest.raises(InputError, match=r"has a tokenizer\. Give token ids with --token-ids"):
        compare(bundle, [bundle], [TEXT])


def test_other_vocabulary_is_refused(fake_build: Callable[..., Any]) -> None:
    builds = [fake_build("reference", np.zeros((9, 9))), fake_build("other", np.zeros((8, 8)))]
    with pytest.raises(InputError, match=r"other has a vocabulary of 8 tokens and reference one of 9"):
        check_comparable(builds, 10)


def test_unfinished_bundle_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from corral.graphs.stages import export_stage

    export_stage(tiny_checkpoint("scout"), tmp_path / "exported")
    with pytest.raises(InputError, match='is at stage "exported", expected "ready"'):
        compare(tmp_path / "exported", [tmp_path / "exported"], [TEXT])


def test_what_is_no_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither manifest\.json nor config\.json.*`corral compile"):
        compare(tmp_path, [tmp_path], [TEXT])
    with pytest.raises(InputError, match="none does not exist"):
        compare(tmp_path / "none", [tmp_path], [TEXT])


def test_window_longer_than_the_context_is_refused(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("scout", "cpu", "fp32")
    with pytest.raises(InputError, match="5000 tokens, and the model has at most 4096"):
        compare(bundle, [bundle], [TEXT], window=5000)


@pytest.mark.parametrize("name", ["window", "predictions", "repeats", "decode_tokens"])
def test_numbers_too_small_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{'tokens' if name == 'predictions' else name} is 0, expected at least"):
        compare(tmp_path, [tmp_path], [TEXT], **{name: 0})  # type: ignore[arg-type]


def test_no_candidate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no candidate"):
        compare(tmp_path, [], [TEXT])


def strip_tokenizer(bundle: Path, out: Path) -> Path:
    shutil.copytree(bundle, out)
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": None, "chat_template": None}))
    return out
