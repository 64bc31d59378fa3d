"""The rows of a long prompt's beginning in a file, so that another process need not compute them.

    one line of JSON: format, SHA-256 of the bundle's manifest, tokens, tokens a block, and the kind of each row
    token ids, int64
    block by block, class by class: rows as they lie in the cache; chunked ones in the last chunk only
    SHA-256 of all that

Numbers are little-endian. A file is read only by the bundle whose rows it has, and only if it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from corral.runtime.prefix_cache import Block, PrefixCache, Rows
from corral.spec.errors import EnvironmentProblem, InputError

FORMAT = 1
MOST_HEADER_BYTES = 1 << 20
DIGEST_BYTES = hashlib.sha256().digest_size


def write_prefix(path: Path, bundle: str, token_ids: Sequence[int], prefixes: PrefixCache) -> int:
    """Write what `prefixes` knows of the beginning of `token_ids`, whole or not at all; returns its tokens.

    A prompt shorter than a block has nothing to keep: 0, and no file. `bundle` is the digest of whose rows they are. Raises
    InputError where nothing is known of a longer one, EnvironmentProblem where the file cannot be written.
    """
    if len(token_ids) < prefixes.block_tokens:
        return 0
    blocks = prefixes.prefix(token_ids)
    if not blocks:
        raise InputError(
            "nothing of this prompt is in the prefix cache: it was not run yet, or had no room in prefix_cache_gb."
        )
    ids = token_ids[: len(blocks) * prefixes.block_tokens]
    digest, partial = hashlib.sha256(), ""
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        with open(handle, "wb") as file:
            for data in _parts(_header(bundle, len(ids), prefixes), ids, blocks, prefixes):
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error}. Choose another place, or make room.") from None
    finally:
        Path(partial).unlink(missing_ok=True) if partial else None
    return len(ids)


def read_prefix(path: Path, bundle: str, prefixes: PrefixCache) -> int:
    """Add what is in a file to `prefixes`; returns its tokens.

    Raises InputError for a file that is damaged, of another bundle, or larger than `prefixes` may be.
    """
    try:
        with path.open("rb") as file:
            ids, blocks = _read(file, path, bundle, prefixes)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}. Expected a file of `--prefix-cache`.") from None
    prefixes.add(ids, blocks)
    return len(ids)


def _header(bundle: str, tokens: int, prefixes: PrefixCache) -> dict[str, Any]:
    kinds = {name: [[a.dtype.str, *a.shape] for a in rows] for name, rows in prefixes.no_rows().items()}
    return {
        "corral_prefix": FORMAT,
        "bundle": bundle,
        "tokens": tokens,
        "block_tokens": prefixes.block_tokens,
        "rows": kinds,
    }


def _parts(
    header: Mapping[str, Any], ids: Sequence[int], blocks: Sequence[Block], prefixes: PrefixCache
) -> Iterator[bytes]:
    yield json.dumps(header).encode() + b"\n"
    yield np.array(ids, "<i8").tobytes()
    for number, block in enumerate(blocks):
        for kv_class in prefixes.needed(number, len(blocks)):
            yield from (np.ascontiguousarray(array).tobytes() for array in block.rows[kv_class])


def _read(file: BinaryIO, path: Path, bundle: str, prefixes: PrefixCache) -> tuple[list[int], list[Block]]:
    line = file.readline(MOST_HEADER_BYTES)
    try:
        header = json.loads(line)
        tokens = header["tokens"] if isinstance(header["tokens"], int) else 0
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no file of a prefix cache. Expected one that `--prefix-cache` wrote.") from None
    if header.get("bundle") != bundle:
        raise InputError(f"{path} is of another bundle, whose rows mean nothing to this one. Name another file.")
    if tokens < 1 or tokens % prefixes.block_tokens or header != _header(bundle, tokens, prefixes):
        raise InputError(f"{path} was written by another version of corral. Remove it, and it is written again.")
    no_rows, size, count = prefixes.no_rows(), prefixes.block_tokens, tokens // prefixes.block_tokens
    kinds = {name: [_kind(array, size) for array in rows] for name, rows in no_rows.items()}
    of_class = {name: sum(math.prod(shape) * kind.itemsize for kind, shape in of) for name, of in kinds.items()}
    row_bytes = sum(of_class[name] * (count - prefixes.first_needed(name, count)) for name in of_class)
    expected, found = len(line) + 8 * tokens + row_bytes + DIGEST_BYTES, os.fstat(file.fileno()).st_size
    if found != expected:
        raise InputError(
            f"{path} has {found} bytes, expected {expected}: it is incomplete. Remove it, or copy it again."
        )
    if row_bytes > prefixes.max_bytes:
        raise InputError(
            f"{path} has {row_bytes / 1e9:.2f} GB of rows, and the prefix cache has {prefixes.max_bytes / 1e9:.2f} GB. "
            "Choose a larger prefix_cache_gb."
        )
    digest = hashlib.sha256(line)

    def take(kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        data = file.read(math.prod(shape) * kind.itemsize)
        digest.update(data)
        return np.frombuffer(data, kind).reshape(shape)

    ids = take(np.dtype("<i8"), (tokens,)).tolist()
    blocks = [
        Block({name: tuple(take(*kind) for kind in kinds[name]) for name in prefixes.needed(number, count)})
        for number in range(count)
    ]
    if file.read(DIGEST_BYTES) != digest.digest():
        raise InputError(f"{path} is damaged: its SHA-256 is not that of its bytes. Remove it, or copy it again.")
    if not all(_finite(rows) for block in blocks for rows in block.rows.values()):
        raise InputError(
            f"{path} has rows that are not finite numbers, which nothing could be computed with. Remove it."
        )
    return ids, blocks


def _kind(no_rows: NDArray[Any], tokens: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    heads, _, *width = no_rows.shape
    return no_rows.dtype, (heads, tokens, *width)


def _finite(rows: Rows) -> bool:
    return all(bool(np.isfinite(array).all()) for array in rows if array.dtype.kind == "f")
