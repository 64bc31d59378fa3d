"""A bundle on disk: opened, every file checked against the manifest, and hashed only once while it does not change.

What was verified is remembered in a *stamp* outside the bundle: per file its size, modification time and inode. A file
whose stamp still fits is not hashed again. Where no stamp can be written, files are hashed at each opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corral.spec.errors import InputError
from corral.spec.manifest import MANIFEST_NAME, FileRecord, Manifest, inside_path, read_manifest
from corral.spec.progress import Progress, silent
from corral.spec.user_cache import user_cache

PIECE_BYTES = 4 << 20

# size, modification time in nanoseconds, inode
Mark = tuple[int, int, int]


@dataclass(frozen=True)
class Bundle:
    """A directory and what its manifest says."""

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file that the manifest names lies. Raises InputError for a name that leads outside."""
        return self.directory / inside_path(name, self.directory / MANIFEST_NAME)

    @property
    def bytes(self) -> int:
        return self.manifest.bytes


def open_bundle(directory: str | Path, verify: bool = True, progress: Progress = silent) -> Bundle:
    """Open a bundle: every listed file is there, inside, of the listed size, and with `verify` of the listed SHA-256.

    Raises InputError naming the first file that is not as the manifest says.
    """
    bundle = Bundle(Path(directory), read_manifest(Path(directory)))
    marks = {record.path: _check_file(bundle, record) for record in bundle.manifest.files}
    if not verify:
        return bundle
    known = _read_stamp(bundle)
    unknown = [record for record in bundle.manifest.files if known.get(record.path) != marks[record.path]]
    if unknown:
        _check_hashes(bundle, unknown, progress)
        _write_stamp(bundle, marks)
    return bundle


def remember_verified(bundle: Bundle) -> None:
    """Note that the bundle's files are as its manifest says: for whoever hashed them while writing them."""
    _write_stamp(bundle, {record.path: _check_file(bundle, record) for record in bundle.manifest.files})


def file_sha256(path: Path, report: Callable[[int], None]) -> str:
    """SHA-256 of a file, read in pieces; `report` is given the bytes of each."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            report(size)
    return digest.hexdigest()


def _check_file(bundle: Bundle, record: FileRecord) -> Mark:
    path = bundle.path(record.path)
    try:
        inside = path.resolve(strict=True).is_relative_to(bundle.directory.resolve())
        found = path.stat()
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing, but the bundle's manifest lists it. Copy the whole bundle again, or compile it again."
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
        raise InputError(f"{path} cannot be read: {error}. Copy the whole bundle again, or compile it again.") from None
    if not inside:
        raise InputError(
            f"{path} is a symbolic link to {path.resolve()}, outside the bundle; expected the file itself. "
            "Copy the bundle with its links resolved (`cp -rL`)."
        )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file, as the bundle's manifest says. Copy the whole bundle again.")
    if found.st_size != record.bytes:
        raise InputError(
            f"{path} has {found.st_size} bytes, expected {record.bytes}: it is incomplete or was changed. "
            "Copy the whole bundle again, or compile it again."
        )
    return (found.st_size, found.st_mtime_ns, found.st_ino)


def _check_hashes(bundle: Bundle, records: list[FileRecord], progress: Progress) -> None:
    done, total = 0, sum(record.bytes for record in records)

    def report(size: int) -> None:
        nonlocal done
        done += size
        progress("check files", done, total, "bytes")

    for record in records:
        path = bundle.path(record.path)
        try:
            found = file_sha256(path, report)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}. Copy the whole bundle again.") from None
        if found != record.sha256:
            raise InputError(
                f"{path} has SHA-256 {found}, expected {record.sha256}: it is damaged or was changed. "
                "Copy the whole bundle again, or compile it again."
            )


def _stamp_path(bundle: Bundle) -> Path:
    manifest = (bundle.directory / MANIFEST_NAME).read_bytes()
    key = hashlib.sha256(manifest + b"\0" + os.fsencode(bundle.directory.resolve())).hexdigest()
    return user_cache() / "verified" / f"{key}.json"


def _read_stamp(bundle: Bundle) -> dict[str, Mark]:
    try:
        files = json.loads(_stamp_path(bundle).read_text(encoding="utf-8"))["files"]
        return {name: (int(mark[0]), int(mark[1]), int(mark[2])) for name, mark in files.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return {}  # no stamp, or an unreadable one: hash


def _write_stamp(bundle: Bundle, marks: dict[str, Mark]) -> None:
    try:
        path = _stamp_path(bundle)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".stamp-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"directory": str(bundle.directory.resolve()), "files": marks}, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        pass  # an unwritable cache only costs time
