"""A stand-in of the Hugging Face Hub: what huggingface_hub asks of its HTTP API, answered on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_letmein"
MAIN = "1" * 40
LFS = (".safetensors", ".pth")


@dataclass
class Repository:
    """Commits, each with its files; branches; who may read it."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    """The stand-in: what it holds, what it was asked for, and which file's download it breaks off once, and where."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, file or api path, range
    break_off: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""
    cdn: str = ""  # another host, as the real one's: large files lie there, and a token must not get there

    def publish(self, name: str, files: dict[str, bytes]) -> Repository:
        """A new repository with one commit, `MAIN`."""
        self.repositories[name] = Repository({MAIN: files}, {"main": MAIN})
        return self.repositories[name]

    def asked_for(self, method: str = "GET") -> set[str]:
        """Files whose content (GET) or description (HEAD) was asked for."""
        return {what for how, what, _ in self.requests if how == method and not what.startswith("/")}


API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
CDN = re.compile(r"/cdn/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file>.+)")


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            for pattern, answer in ((API, self.api), (CDN, self.content), (RESOLVE, self.resolve)):
                if match := pattern.fullmatch(path):
                    what = match.groupdict().get("file") or path
                    hub.requests.append((self.command, what, self.headers.get("Range") or ""))
                    return answer(**match.groupdict())
            return self.say(404, {"X-Error-Code": "RepoNotFound"})

        def say(self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:sent])
                if sent is not None:
                    self.close_connection = True

        def find(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
            repository = hub.repositories.get(name)
            if repository is None:
                self.say(404, {"X-Error-Code": "RepoNotFound"})
                return None
            commit = repository.branches.get(revision or "main", revision or "")
            if commit not in repository.commits:
                self.say(404, {"X-Error-Code": "RevisionNotFound"})
                return None
            return repository, commit

        def api(self, name: str, what: str | None, revision: str | None) -> None:
            if (found := self.find(name, revision)) is None:
                return
            repository, commit = found
            files = repository.commits[commit]
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                | ({"lfs": {"oid": digest(data), "size": len(data), "pointerSize": 134}} if path.endswith(LFS) else {})
                for path, data in files.items()
            ]
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            self.say(200, {"Content-Type": "application/json"}, json.dumps(tree if what == "tree" else info).encode())

        def resolve(self, name: str, revision: str, file: str) -> None:
            if (found := self.find(name, revision)) is None:
                return
            repository, commit = found
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                known = "Authorization" in self.headers
                return self.say(403 if known else 401, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
            if file not in repository.commits[commit]:
                return self.say(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            data = repository.commits[commit][file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if not file.endswith(LFS):
                return self.say(200, headers, data)
            linked = {"X-Linked-Etag": f'"{digest(data)}"', "X-Linked-Size": str(len(data))}
            self.say(302, headers | linked | {"Location": f"{hub.cdn}/cdn/{name}/{commit}/{file}"})

        def content(self, name: str, revision: str, file: str) -> None:
            assert "Authorization" not in self.headers
            data = hub.repositories[name].commits[revision][file]
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if match is None:
                return self.say(200, {"ETag": f'"{digest(data)}"'}, data, hub.break_off.pop(file, None))
            begin, end = int(match[1]), int(match[2] or len(data) - 1) + 1
            self.say(206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}, data[begin:end])

    return Handler


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, running, and huggingface_hub pointed to it with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    # The library reads the environment when it is imported, which another test may have done before.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
