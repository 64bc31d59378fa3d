"""The weight plan: plain data that survives JSON, and places where bytes may lie."""

from __future__ import annotations

import dataclasses
import json
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.spec.weight_plan import ALIGNMENT, Entry, Source, Step, WeightPlan, step


def entry(name: str, size: int = 8, dtype: str = "float32") -> Entry:
    return Entry(name, dtype, (size,), (Source("t", rows=(0, size)),), (step("cast", dtype=dtype), step("rows")))


EXPERTS = Entry(
    "experts.codes",
    "uint4",
    (4, 64, 32),
    tuple(Source("w", rows=(0, 64), columns=(0, 32), index=e, transposed=True) for e in range(4)),
    (step("rtn", bits=4, group_size=32, output="codes"), step("pack_qmoe")),
    weight="layers.0.feed_forward.experts.gate_up_proj",
    parameters=4 * 64 * 32,
    cut="rows",
    cut_multiple=16,
)


def test_json_round_trip() -> None:
    plan = WeightPlan({})
    plan.add(entry("a"), EXPERTS, entry("b", dtype="bfloat16"))
    again = WeightPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert list(again.entries) == ["a", "experts.codes", "b"]


def test_entries_are_plain_data() -> None:
    assert pickle.loads(pickle.dumps(EXPERTS)) == EXPERTS  # noqa: S301
    assert hash(EXPERTS) == hash(dataclasses.replace(EXPERTS))
    assert str(EXPERTS.steps[0]) == "rtn bits=4 group_size=32 -> codes"
    assert step("rtn", group_size=32, bits=4) == step("rtn", bits=4, group_size=32) == Step(
        "rtn", (("bits", 4), ("group_size", 32))
    )  # fmt: skip


def test_bytes_of_sub_byte_types() -> None:
    assert EXPERTS.nbytes == 4 * 64 * 32 // 2
    assert entry("a", 6, "bfloat16").nbytes == 12


def test_a_name_is_taken_once() -> None:
    plan = WeightPlan({})
    plan.add(entry("a"))
    with pytest.raises(AssertionError, match="already has an entry a"):
        plan.add(entry("a"))


def test_replace_keeps_the_place() -> None:
    plan = WeightPlan({})
    plan.add(entry("a"), entry("b"), entry("c"))
    plan.replace("b", entry("b.codes"), entry("b.scales"))
    assert [e.name for e in plan] == ["a", "b.codes", "b.scales", "c"]


def test_another_layout_changes_the_last_step_only() -> None:
    changed = EXPERTS.with_layout(step("pack_rows"), shape=(64, 128))
    assert changed.steps == (EXPERTS.steps[0], step("pack_rows"))
    assert (changed.shape, changed.name) == ((64, 128), EXPERTS.name)


@given(
    sizes=st.lists(st.integers(0, 9000), max_size=12),
    shard_bytes=st.sampled_from([ALIGNMENT, 4 * ALIGNMENT, 1 << 40]),
)
def test_placements_are_aligned_apart_and_within_shards(sizes: list[int], shard_bytes: int) -> None:
    plan = WeightPlan({})
    plan.add(*(entry(str(i), size) for i, size in enumerate(sizes)))
    placements = list(plan.placements(shard_bytes).values())
    assert [p.nbytes for p in placements] == [size * 4 for size in sizes]
    for before, after in pairwise(placements):
        assert after.shard in (before.shard, before.shard + 1)
        assert after.shard > before.shard or after.offset >= before.offset + before.nbytes
    for place in placements:
        assert place.offset % ALIGNMENT == 0
        assert place.offset == 0 or place.offset + place.nbytes <= shard_bytes


def test_a_tensor_larger_than_a_shard_has_one_to_itself() -> None:
    plan = WeightPlan({})
    plan.add(entry("a", 10), entry("huge", 10_000), entry("b", 10))
    places = plan.placements(shard_bytes=8192)
    assert [(p.shard, p.offset) for p in places.values()] == [(0, 0), (1, 0), (2, 0)]
