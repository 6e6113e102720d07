"""A small client of the service: plan, create, follow, report, download. Nothing but HTTP.

Files are fetched by ranges: a download that is cut goes on where it stopped, and counts only with the right sha256.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from examples.demo.errors import DemoFailed

OVER = frozenset({"succeeded", "failed", "cancelled", "expired"})
_POLL_S = 0.3
_TRIES = 5


class Client:
    """Speaks with one service."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=60.0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def plan(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what the request would do; nothing is kept."""
        return self._answer(self._http.post("/v1/plans", json=request))

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the new job."""
        return self._answer(self._http.post("/v1/jobs", json=request))

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Yield the job as it changes, until it is over."""
        while True:
            job = self._answer(self._http.get(f"/v1/jobs/{job_id}"))
            yield job
            if job["status"] in OVER:
                return
            time.sleep(_POLL_S)

    def cancel(self, job_id: str) -> None:
        """Ask for the job's end."""
        self._answer(self._http.post(f"/v1/jobs/{job_id}/cancel"))

    def report(self, job_id: str) -> dict[str, Any]:
        """Return the report of a finished job."""
        return self._answer(self._http.get(f"/v1/jobs/{job_id}/report"))

    def download(self, job_id: str, folder: Path) -> list[Path]:
        """Fetch every file of the artifact into the folder and return where they are."""
        manifest = self._answer(self._http.get(f"/v1/jobs/{job_id}/artifact"))
        return [self._fetch(file, folder) for file in manifest["files"]]

    def _fetch(self, file: dict[str, Any], folder: Path) -> Path:
        target = (folder / file["path"]).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise DemoFailed(f"the manifest names {file['path']!r}, which is outside of {folder}")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.touch()
        for attempt in range(_TRIES):
            try:
                self._fetch_rest(file, part)
                break
            except httpx.TransportError as error:
                if attempt == _TRIES - 1:
                    raise DemoFailed(f"{file['path']}: the download was cut {_TRIES} times, last by: {error}") from error
        found = sha256_of(part)
        if found != file["sha256"]:
            part.unlink()
            raise DemoFailed(f"{file['path']} arrived with sha256 {found}; the manifest says {file['sha256']}")
        return part.rename(target)

    def _fetch_rest(self, file: dict[str, Any], part: Path) -> None:
        """Append to the part what it lacks."""
        there = part.stat().st_size
        if there == file["bytes"]:
            return
        headers = {"Accept-Encoding": "identity"}
        if there:
            headers |= {"Range": f"bytes={there}-", "If-Match": f'"{file["sha256"]}"'}
        with self._http.stream("GET", file["url"], headers=headers) as answer:
            if answer.is_error:
                answer.read()
                self._answer(answer)
            with part.open("ab" if answer.status_code == 206 else "wb") as out:
                # As they arrive: collected into larger chunks, the last bytes before a cut would be lost.
                for chunk in answer.iter_raw():
                    out.write(chunk)

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        if response.is_success:
            return response.json()
        try:
            problem = response.json()
            told = f"{problem['code']}: {problem['detail']}"
        except (ValueError, KeyError, TypeError):
            told = response.text[:500]
        raise DemoFailed(f"{response.request.method} {response.request.url.path} was answered {response.status_code} {told}")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
