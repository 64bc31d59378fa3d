"""Jobs: a plan cut into any pieces and run in any order writes the same bytes; shared reads happen once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.graphs.execute.job import plan_jobs, run_job
from corral.graphs.execute.shards import shard_sizes
from corral.graphs.execute.steps import STEPS
from corral.graphs.quantize.rtn import rtn
from corral.spec.weight_plan import ALIGNMENT, Entry, Source, WeightPlan, step

MATRIX = np.arange(96 * 128, dtype=np.float32).reshape(96, 128) % 251 - 125
SOURCE = Source("w", rows=(0, 96), columns=(0, 128))


def read(source: Source) -> np.ndarray:
    assert source.columns is not None
    return np.ascontiguousarray(MATRIX[slice(*source.rows), slice(*source.columns)])


def codes_and_scales(layout: str) -> list[Entry]:
    """Codes and scales of one matrix: along the rows (as MatMulNBits) or the columns (as DequantizeLinear)."""
    args: dict[str, Any] = {"bits": 4, "group_size": 32}
    cut: dict[str, Any] = {"cut": layout, "cut_multiple": 32 if layout == "columns" else 1, "pieces": (SOURCE,)}
    codes = {"rows": ((96, 4, 16), "uint8"), "columns": ((128, 96), "int4")}[layout]
    scales = {"rows": (96, 4), "columns": (4, 96)}[layout]
    return [
        Entry("codes", codes[1], codes[0], steps=(step("rtn", "codes", **args), step(f"pack_{layout}", bits=4)), **cut),
        Entry("scales", "float32", scales, steps=(step("rtn", "scales", **args), step(layout, dtype="float32")), **cut),
    ]


def tiles() -> list[Entry]:
    """Codes and scales of two experts for corral's CPU kernels."""
    args: dict[str, Any] = {"bits": 4, "group_size": 32}
    experts = tuple(Source("w", rows=rows, columns=(0, 128)) for rows in ((0, 48), (48, 96)))
    cut: dict[str, Any] = {"cut": "rows", "cut_multiple": 16, "pieces": experts}
    codes = step("rtn", "codes", **args), step("tile_codes", bits=4)
    scales = step("rtn", "scales", **args), step("tile_scales")
    return [
        Entry("codes", "uint8", (2, 3, 8 * 128), steps=codes, **cut),
        Entry("scales", "float16", (2, 3, 4, 16), steps=scales, **cut),
    ]


def run(plan: WeightPlan, limit: int, order: list[int] | None = None) -> bytes:
    placements = plan.placements()
    shard = bytearray(shard_sizes(placements)[0])
    jobs = plan_jobs(plan, placements, limit)
    for i in order or range(len(jobs)):
        for output, data in run_job(jobs[i % len(jobs)], read):
            shard[output.offset : output.offset + output.nbytes] = data
    return bytes(shard)


@pytest.mark.parametrize("layout", ["rows", "columns", "tiles"])
@given(limit=st.integers(1, 96 * 128), seed=st.integers(0, 99))
def test_the_bytes_do_not_depend_on_how_the_plan_is_cut_or_ordered(layout: str, limit: int, seed: int) -> None:
    plan = WeightPlan({entry.name: entry for entry in (tiles() if layout == "tiles" else codes_and_scales(layout))})
    jobs = plan_jobs(plan, plan.placements(), limit)
    order = np.random.default_rng(seed).permutation(len(jobs)).tolist()
    assert run(plan, limit, order) == run(plan, limit=1 << 30)


def test_a_small_limit_really_cuts() -> None:
    plan = WeightPlan({entry.name: entry for entry in codes_and_scales("rows")})
    jobs = plan_jobs(plan, plan.placements(), limit=1000)
    assert len(jobs) == 14  # 7 rows of 128 fit
    assert max(job.elements for job in jobs) <= 1000


def test_codes_and_scales_share_one_read_and_one_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return rtn(*args, **arguments)

    monkeypatch.setitem(STEPS, "rtn", counted)
    plan = WeightPlan({entry.name: entry for entry in codes_and_scales("rows")})
    (job,) = plan_jobs(plan, plan.placements())
    outputs = run_job(job, read)
    assert [output.entry for output, _ in outputs] == ["codes", "scales"]
    assert len(calls) == 1


def test_pieces_lie_one_after_the_other() -> None:
    pieces = (Source("w", rows=(0, 2), columns=(0, 3)), Source("w", rows=(5, 6), columns=(0, 3)))
    entry = Entry("both", "float32", (3, 3), pieces, (step("rows", dtype="float32"),))
    plan = WeightPlan({"both": entry})
    got = np.frombuffer(run(plan, 1 << 30), np.float32).reshape(3, 3)
    np.testing.assert_array_equal(got, MATRIX[[0, 1, 5], :3])


def test_placements_are_aligned_and_shards_bounded() -> None:
    def entry(name: str, size: int) -> Entry:
        return Entry(name, "uint8", (size,), (Source("w", rows=(0, size)),), (step("rows", dtype="uint8"),))

    plan = WeightPlan({str(i): entry(str(i), size) for i, size in enumerate([10, 5000, 9000, 20000, 3])})
    places = plan.placements(shard_bytes=16384)
    assert [(p.shard, p.offset) for p in places.values()] == [(0, 0), (0, 4096), (1, 0), (2, 0), (3, 0)]
    assert all(p.offset % ALIGNMENT == 0 for p in places.values())


def test_a_plan_round_trips_through_json() -> None:
    import json

    plan = WeightPlan({entry.name: entry for entry in codes_and_scales("columns")})
    assert WeightPlan.from_json(json.loads(json.dumps(plan.to_json()))).entries == plan.entries
