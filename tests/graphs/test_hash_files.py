from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from corral.graphs.hash_files import hash_files


@pytest.mark.parametrize("threads", [1, 3])
def test_each_file_in_the_order_asked_for_whoever_is_done_first(tmp_path: Path, threads: int) -> None:
    content = {"large": os.urandom(3_000_000), "empty": b"", "one": b"1", "other": os.urandom(70_000)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "not asked for").write_bytes(b"2")
    told: list[tuple[float, float]] = []

    def progress(what: str, done: float, total: float, unit: str) -> None:
        assert (what, unit) == ("hash files", "bytes")
        told.append((done, total))

    records = hash_files(tmp_path, list(content), threads=threads, progress=progress)
    assert [record.path for record in records] == list(content)
    for record in records:
        data = content[record.path]
        assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [done for done, _ in told] == sorted(done for done, _ in told), "progress never goes back"
    assert told[-1] == (3_070_001, 3_070_001)


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_files(tmp_path, ["nowhere"])
