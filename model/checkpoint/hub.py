"""`owner/name[@revision]`: a checkpoint in a repository of the Hugging Face Hub, through `huggingface_hub`.

The revision is pinned to its commit first; everything after asks for that commit. What is downloaded lies in the
library's own cache (HF_HOME), so that it is shared with other programs, whole files are not fetched twice, and what is
there works offline. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean.
"""

from __future__ import annotations

import errno
import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.model.checkpoint.names import is_dropped
from corral.model.checkpoint.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsStore,
    join_headers,
    parse_header,
    read_header,
    read_weight_map,
)
from corral.model.checkpoint.store import TensorInfo, listed
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.progress import Progress

SPELLING = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
# What lies beside weights and is read; patterns have no folder, so that nothing of `original/` matches.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "params.json", INDEX_NAME,
)  # fmt: skip
# Meta's own repositories. Only where there are no safetensors.
META_FILES = re.compile(r"consolidated(\.\d\d)?\.pth|tokenizer\.model")
CONNECTIONS = 8
LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class HubName:
    """A repository, and a branch, tag or commit of it."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit as far as they are here: `directory` links to them. `sizes` knows all, in bytes."""

    name: HubName  # pinned: the revision is a commit
    directory: Path
    sizes: Mapping[str, int]

    @property
    def missing(self) -> list[str]:
        """Weights that a compile reads and that are not here."""
        return [file for file in self._needed() if not (self.directory / file).is_file()]

    def headers(self) -> SafetensorsStore:
        """What the safetensors hold, of their headers alone: nothing can be read of it. Fetches some kB a file."""
        files = [file for file in self._needed() if file.endswith(".safetensors")]
        if not files:
            raise InputError(
                f"{self.name} has no safetensors files, whose headers could be read without downloading all."
            )
        with _explained(self.name), ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = dict(zip(files, pool.map(self._header, files), strict=True))
        if INDEX_NAME not in self.sizes or SINGLE_NAME in self.sizes:
            return SafetensorsStore({name: info for header in headers.values() for name, info in header.items()})
        index = self.directory / INDEX_NAME
        return SafetensorsStore(join_headers(index, read_weight_map(index), headers))

    def _header(self, file: str) -> dict[str, TensorInfo]:
        from huggingface_hub import hf_hub_url

        path = self.directory / file
        if path.is_file():
            return read_header(path)
        if file not in self.sizes:
            raise InputError(f"{self.name} has no file {file}, which its {INDEX_NAME} names: it is incomplete.")
        url = hf_hub_url(self.name.repository, file, revision=self.name.revision)
        return parse_header(lambda begin, end: _read_range(url, begin, end), self.sizes[file], path)

    def _needed(self) -> list[str]:
        """The files with weights of the decoder; in Meta's form the tokenizer, too."""
        if SINGLE_NAME in self.sizes:
            return [SINGLE_NAME]
        if INDEX_NAME in self.sizes:
            weight_map = read_weight_map(self.directory / INDEX_NAME)
            return sorted({file for name, file in weight_map.items() if not is_dropped(name)})
        here = [file for file in self.sizes if "/" not in file]
        plain = [file for file in here if file.endswith(".safetensors")]
        return sorted(plain or [file for file in here if META_FILES.fullmatch(file)])


def hub_name(path: Path) -> HubName | None:
    """What `path` names where it is no file here and spelled like a repository; None otherwise."""
    match = SPELLING.fullmatch(str(path))
    return HubName(match["repository"], match["revision"]) if match and not path.exists() else None


def fetch(name: HubName, *, weights: bool, progress: Progress) -> Snapshot:
    """Pin the revision and download what lies beside the weights, and with `weights` those that a compile reads.

    Raises InputError where there is no such repository or revision, EnvironmentProblem where it is gated, cannot be
    reached, or the disk is too small.
    """
    from huggingface_hub import HfApi, snapshot_download

    progress(f"look up {name.repository}", 0, 0, "")
    with _explained(name):
        commit = HfApi().resolve_revision(name.repository, revision=name.revision).resolved
        pinned = HubName(name.repository, commit)
        bar = _bar(lambda done: None)
        directory = Path(
            snapshot_download(
                name.repository,
                revision=commit,
                allow_patterns=list(SIDE_FILES),
                tqdm_class=bar,
                max_workers=CONNECTIONS,
            )
        )
    snapshot = Snapshot(pinned, directory, _sizes(pinned, directory))
    if weights and (missing := snapshot.missing):
        total = sum(snapshot.sizes.get(file, 0) for file in missing)
        _check_disk_space(pinned, total)
        with _explained(pinned):
            bar = _bar(lambda done: progress("download", done, total, "bytes"))
            snapshot_download(name.repository, revision=commit, allow_patterns=missing, tqdm_class=bar)
        if absent := snapshot.missing:
            raise InputError(f"{pinned} has no file {listed(absent)}, which its {INDEX_NAME} names: it is incomplete.")
    return snapshot


def _sizes(name: HubName, directory: Path) -> dict[str, int]:
    """All files of a commit, or of a cache that an older library filled and that is now offline, those that are here."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(name.repository, revision=name.revision)}
    except CachedRepoTreeNotFoundError:
        return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}


def _check_disk_space(name: HubName, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if needed > free:
        raise EnvironmentProblem(
            f"{name} has {needed / 1e9:.1f} GB to download, but the disk of {cache} has {free / 1e9:.1f} GB free. Make "
            "room, or set HF_HOME to a directory on a larger disk."
        )


def _bar(report: Callable[[float], None]) -> type[Any]:
    """The progress bar that huggingface_hub is given: it shows nothing and reports bytes.

    The library has two bars of bytes, received and written; the further one counts.
    """
    from tqdm import tqdm

    most = 0.0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> bool:
            nonlocal most
            if self.unit == "B" and self.n > most:
                most = self.n
                report(most)
            return True

    return Bar


def _read_range(url: str, begin: int, end: int) -> bytes:
    """Bytes of a remote file; never more, even of a server that would send all of it."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise EnvironmentProblem(
                f"{url}: the server sends whole files only; download the checkpoint to plan for it."
            )
        return bytes(response.read())


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Say what the library's errors mean, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except CorralError:
        raise
    except errors.GatedRepoError:
        raise EnvironmentProblem(
            f"{name} is gated: its makers give access on request. Ask for it on the model's page, and when it is granted "
            "log in here with `hf auth login`, or set HF_TOKEN to a token that may read it."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name} is neither a directory here nor a repository on the Hub, or it is a private one. Check the spelling "
            "(owner/name), or log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{name.repository} has no branch, tag or commit {name.revision}. Check the spelling."
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{name} is neither a directory here nor the name of a repository: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
            raise
        raise EnvironmentProblem(
            f"{name} is no directory here, and on the Hub it cannot be had now; nor is all of it in the cache. Check the "
            f"network, HF_ENDPOINT and HF_HUB_OFFLINE, and do the same again: what was downloaded is kept. "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
