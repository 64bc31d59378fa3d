"""Decode with a bundle that is larger than the memory it may use, for several limits and kinds of routing.

    python benchmarks/larger_than_memory.py /tmp/scout --memory 8 --memory 16 --pool 1 --pool 64 --json

Each figure has a process of its own in a memory cgroup of that many GiB (root is needed for one; without --memory there is
none), which begins with nothing of the bundle in memory. It decodes tokens drawn from a pool of so many token ids: the
fewer, the more often a token chooses the experts of one before it. The first half of the tokens only warms up. Told are
seconds a token, bytes that the disk read for one, and what share of the disk's own rate, measured before and after, that is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cpu_engines import anonymous_bytes

from corral.spec.bundle import open_bundle

CGROUPS = Path("/sys/fs/cgroup")
SAMPLE_BYTES, BLOCK = 2 << 30, 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", type=float, action="append", help="GiB; may be given several times.")
    parser.add_argument("--pool", type=int, action="append", help="Of token ids; may be given several times.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(decode(options.bundle, options.pool[0], options.tokens)))
        return
    runs = []
    for limit in options.memory or [None]:
        for pool in options.pool or [1, 16, 1024]:
            before = disk_rate(options.bundle)
            run = one_run(options.bundle, limit, pool, options.tokens)
            run["disk_bytes_per_second"] = [before, disk_rate(options.bundle)]
            runs.append({"memory_gib": limit, "pool": pool, **run})
            if not options.json:
                print(in_words(runs[-1]), flush=True)
    if options.json:
        print(
            json.dumps(
                {"bundle_bytes": sum(path.stat().st_size for path in files_of(options.bundle)), "runs": runs}, indent=1
            )
        )


def one_run(bundle: Path, limit: float | None, pool: int, tokens: int) -> dict[str, Any]:
    forget(bundle)
    command = [sys.executable, __file__, str(bundle), "--worker", "--pool", str(pool), "--tokens", str(tokens)]
    with cgroup(limit) as enter:
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=enter, text=True)
    if done.returncode:
        sys.exit(f"the run within {limit} GiB ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def decode(bundle: Path, pool: int, tokens: int) -> dict[str, Any]:
    """Seconds and bytes read of each token, and this process's anonymous memory at the end."""
    from corral.runtime.embedding import EmbeddingTable
    from corral.runtime.forward import forward
    from corral.runtime.onnxruntime_session import OnnxRuntimeSession

    started = time.monotonic()
    opened = open_bundle(bundle, verify=False)
    session, embed = OnnxRuntimeSession(opened), EmbeddingTable(opened)
    caches = session.new_caches(opened.manifest.kv, tokens)
    caches.reserve(1, tokens)
    opening = time.monotonic() - started
    rng = np.random.default_rng(0)
    ids = rng.choice(rng.choice(opened.manifest.model.vocab_size, pool, replace=False), tokens)
    seconds, read, chosen = [], [], []
    for position, token in enumerate(ids.tolist()):
        before, started = bytes_read(), time.monotonic()
        logits = forward(session, embed, caches, caches.slot(0), [[token]], [position], [[0]])
        seconds.append(time.monotonic() - started)
        read.append(bytes_read() - before)
        chosen.append(int(logits.argmax()))
    warm = slice(tokens // 2, None)
    return {
        "opening_seconds": opening,
        "first_token_seconds": seconds[0],
        "seconds": seconds[warm],
        "bytes_read": read[warm],
        "anonymous_bytes": anonymous_bytes(),
        "chosen": chosen,
    }


def bytes_read() -> int:
    """That the disk gave this process so far, readahead included."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])  # type: ignore[index]


@contextmanager
def cgroup(limit: float | None) -> Iterator[Any]:
    """What a new process must call to be held to `limit` GiB, of the pages of files that it reads, too."""
    if limit is None:
        yield None
        return
    v1 = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if v1 else CGROUPS) / f"corral-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(int(limit * 2**30)))
    except OSError as error:
        sys.exit(f"no memory cgroup can be made here: {error}. Leave --memory out.")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def files_of(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def forget(bundle: Path) -> None:
    """Let the system drop what it holds of the bundle's files."""
    for path in files_of(bundle):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(bundle: Path) -> float:
    """Bytes a second of plain reading, with nothing of the file in memory."""
    forget(bundle)
    largest = max(files_of(bundle), key=lambda path: path.stat().st_size)
    done, started = 0, time.monotonic()
    with largest.open("rb", buffering=0) as file:
        while done < SAMPLE_BYTES and (block := file.read(BLOCK)):
            done += len(block)
    return done / (time.monotonic() - started)


def in_words(run: dict[str, Any]) -> str:
    seconds, read = statistics.median(run["seconds"]), statistics.mean(run["bytes_read"])
    rate, disk = 1 / statistics.mean(run["seconds"]), statistics.mean(run["disk_bytes_per_second"])
    limit = f"{run['memory_gib']:g} GiB" if run["memory_gib"] else "no limit"
    return (
        f"{limit:>9}, {run['pool']:6} tokens in the pool: {rate:.2f} tokens/s (median {seconds:.2f} s, "
        f"{min(run['seconds']):.2f} to {max(run['seconds']):.2f}), {read / 1e9:.2f} GB read a token, "
        f"{rate * read / disk:.0%} of the disk's {disk / 1e9:.2f} GB/s; anonymous {run['anonymous_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
