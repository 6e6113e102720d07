"""A small hub on the loopback address, serving folders as model and data set repositories.

It answers what ``huggingface_hub`` and ``datasets`` ask for, with the headers and error codes by which they tell a
missing repository from a missing revision, a missing file or a gated one:

    with FakeHub() as hub:
        commit = hub.add_model("someone/tiny", folder)             # revision "main"; the commit is a hash of the files
        hub.add_model("someone/tiny", other_folder, revision="v2")  # a branch; a changed "main" is added again
        hub.add_dataset("someone/text", folder_with_parquet)
        hub.add_model("someone/closed", folder, gated_for="hf_secret")  # 401 without a token, 403 with another one
        hub.cut_next("model.safetensors", after=1000)               # that download breaks off once
        hub.answer_next("config.json", status=503)                  # once; times=3 for three times
        ...
        hub.requests                                                # every request as "GET /path", with its Range

In the same process name the hub: ``hf_hub_download(..., endpoint=hub.url, cache_dir=...)``, ``HfApi(endpoint=hub.url)``.
``datasets``, and code that names no endpoint, read HF_ENDPOINT once, when they are imported: run those in a fresh
process with ``env=hub.environment(cache_folder)``, which also keeps caches and tokens of this machine out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Repository:
    """One repository: its revisions, and whom it lets in."""

    name: str
    gated_for: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    """Branch -> commit."""
    commits: dict[str, Path] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch or a commit hash names."""
        return self.revisions.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """A hub for the time of a ``with`` block."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._cuts: list[tuple[str, int]] = []
        self._answers: list[tuple[str, int]] = []
        self._lock = Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the environment in which a fresh process takes this for the hub; ``cache`` receives its downloads."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**mine, **quiet, "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}

    def add_model(self, name: str, folder: Path, *, revision: str = "main", gated_for: str | None = None) -> str:
        """Serve a folder as a model repository and return its commit."""
        return self._add("models", name, folder, revision, gated_for)

    def add_dataset(self, name: str, folder: Path, *, revision: str = "main", gated_for: str | None = None) -> str:
        """Serve a folder as a data set repository and return its commit."""
        return self._add("datasets", name, folder, revision, gated_for)

    def cut_next(self, path_end: str, *, after: int) -> None:
        """Break the next download of a file off after some bytes, though the headers promise all of it."""
        self._cuts.append((path_end, after))

    def answer_next(self, path_end: str, *, status: int, times: int = 1) -> None:
        """Answer the next requests whose path ends so with nothing but a status."""
        self._answers += [(path_end, status)] * times

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def find(self, kind: str, name: str) -> Repository | None:
        """Return a repository."""
        return self._repositories.get((kind, name))

    def take_cut(self, path: str) -> int | None:
        """Return, once, after how many bytes this download is to break off."""
        return self._take(self._cuts, path)

    def take_answer(self, path: str) -> int | None:
        """Return, once, the status with which this request is to be refused."""
        return self._take(self._answers, path)

    def _take(self, planned: list[tuple[str, int]], path: str) -> int | None:
        with self._lock:
            for entry in planned:
                if path.endswith(entry[0]):
                    planned.remove(entry)
                    return entry[1]
        return None

    def _add(self, kind: Kind, name: str, folder: Path, revision: str, gated_for: str | None) -> str:
        repository = self._repositories.setdefault((kind, name), Repository(name))
        repository.gated_for = gated_for
        commit = _commit_of(folder)
        repository.revisions[revision] = commit
        repository.commits[commit] = folder
        return commit

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (_Handler,), {"hub": self})


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent when a client hangs up early, as every stream that has read enough does."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Connections close after each answer, so that none outlives the ``with`` block."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(" ".join([self.command, path, *filter(None, [self.headers.get("Range")])]))
        if (status := self.hub.take_answer(path)) is not None:
            self._send(status, {})
        elif match := _API.fullmatch(path):
            self._api(*match.groups(), body=body)
        elif match := _FILE.fullmatch(path):
            self._file("datasets" if match[1] else "models", *match.groups()[1:])
        else:
            self._send_error(404, "EntryNotFound", f"no such page: {path}")

    def _api(self, kind: str, name: str, verb: str | None, revision: str | None, below: str | None, *, body: bytes) -> None:
        found = self._find(kind, name, revision or "main")
        if found is None:
            return
        repository, commit, folder = found
        if verb == "tree":
            self._tree(folder, below or "")
        elif verb == "paths-info":
            asked = _asked_paths(body, self.headers.get("Content-Type", ""))
            self._send_json([_entry(folder, folder / path) for path in asked if (folder / path).exists()])
        else:
            self._send_json(_info(repository, commit, folder))

    def _tree(self, folder: Path, below: str) -> None:
        top = folder / below
        if not top.is_dir():
            self._send_error(404, "EntryNotFound", f"no folder {below}")
            return
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        self._send_json([_entry(folder, path) for path in sorted(top.rglob("*") if recursive else top.iterdir())])

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        found = self._find(kind, name, revision)
        if found is None or not self._let_in(found[0]):
            return
        _, commit, folder = found
        path = folder / file
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            self._send_error(404, "EntryNotFound", f"no file {file}", commit=commit)
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send_content(content, headers, path=file)

    def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, str, Path] | None:
        repository = self.hub.find(kind, name)
        if repository is None:
            self._send_error(404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit, repository.commits[commit]

    def _let_in(self, repository: Repository) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.gated_for is None or token == repository.gated_for:
            return True
        self._send_error(403 if token else 401, "GatedRepo", f"Access to model {repository.name} is restricted")
        return False

    def _send_content(self, content: bytes, headers: dict[str, str], *, path: str) -> None:
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None or not (match[1] or match[2]):
            self._send(200, {**headers, "Content-Length": str(len(content))}, content, path=path)
            return
        first = int(match[1]) if match[1] else max(0, len(content) - int(match[2]))
        last = min(int(match[2]) if match[1] and match[2] else len(content) - 1, len(content) - 1)
        if first >= len(content):
            self._send(416, {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        part = content[first : last + 1]
        ranged = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(len(part))}
        self._send(206, {**headers, **ranged}, part, path=path)

    def _send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(content))}, content)

    def _send_error(self, status: int, code: str, message: str, *, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, headers if commit is None else {**headers, "X-Repo-Commit": commit})

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", *, path: str | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = None if path is None else self.hub.take_cut(path)
        self.wfile.write(content if cut is None else content[:cut])


def _commit_of(folder: Path) -> str:
    commit = hashlib.sha1(usedforsecurity=False)
    for path in _files_of(folder):
        commit.update(f"{path.relative_to(folder)} {_blob(path.read_bytes())}\n".encode())
    return commit.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _blob(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _info(repository: Repository, commit: str, folder: Path) -> dict[str, Any]:
    siblings = [
        {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, "blobId": _blob(path.read_bytes())}
        for path in _files_of(folder)
    ]
    gated = "manual" if repository.gated_for else False
    about = {"private": False, "disabled": False, "gated": gated, "downloads": 0, "likes": 0, "tags": []}
    return {"_id": commit[:24], "id": repository.name, "sha": commit, "siblings": siblings, **about}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _blob(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": _blob(path.read_bytes()), "size": path.stat().st_size}


def _asked_paths(body: bytes, content_type: str) -> list[str]:
    if "json" in content_type:
        return list(json.loads(body)["paths"])
    return parse_qs(body.decode()).get("paths", [])
