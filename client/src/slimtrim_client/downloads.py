"""Fetching an artifact: some files at a time, each resumed where it was cut and counted only with the right sha256.

Links expire in minutes; whoever meets an expired one brings a fresh manifest for all. A manifest that names other bytes than
before starts the download over, so that a folder never holds files of two artifacts that were taken for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from slimtrim_client.artifacts import Verdict, WantedFile, headers_for, judge, strong_tag, wanted_files
from slimtrim_client.connection import answer_of, failed_of
from slimtrim_client.documents import Manifest
from slimtrim_client.errors import BadInput, Damaged, UnexpectedAnswer, Unreachable
from slimtrim_client.messages import Answer, Failed, refusal_of
from slimtrim_client.parts import Part, make_folder, require_room
from slimtrim_client.retries import Patience, Tries, retry_after

OnProgress = Callable[[str, int, int], None]
"""Told the path of a file, how many of its bytes are there, and how many it has."""
GetManifest = Callable[[], Awaitable[Manifest]]


@dataclass(frozen=True)
class DownloadedFile:
    """One file as it lies there now."""

    path: Path
    bytes: int
    sha256: str
    fetched: bool
    """Whether bytes of it came over the wire; False where it lay there already."""


@dataclass(frozen=True)
class Download:
    """An artifact that is there, every sha256 as the manifest says."""

    folder: Path
    files: tuple[DownloadedFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


async def download(
    http: httpx.AsyncClient, get_manifest: GetManifest, folder: Path, *,
    parallel: int, patience: Patience, on_progress: OnProgress | None,
) -> Download:  # fmt: skip
    """Fetch all files, or raise and leave the parts for the next time."""
    if parallel < 1:
        raise BadInput(f"at least one file is fetched at a time, not {parallel}")
    for _ in range(2):
        fetch = _Fetch(http, get_manifest, await get_manifest(), patience, on_progress)
        try:
            return await fetch.all(folder, parallel)
        except _ManifestChanged:
            continue
    raise Damaged(f"the artifact was replaced twice while it was fetched into {folder}; try again")


class _ManifestChanged(Exception):
    """A fresh manifest names other bytes."""


class _Fetch:
    """One try at one manifest."""

    def __init__(
        self, http: httpx.AsyncClient, get_manifest: GetManifest, manifest: Manifest,
        patience: Patience, on_progress: OnProgress | None,
    ) -> None:  # fmt: skip
        self._http, self._get_manifest, self._patience = http, get_manifest, patience
        self._on_progress = on_progress
        self._wanted = wanted_files(manifest)
        self._links = _links(manifest)
        self._refreshing = asyncio.Lock()

    async def all(self, folder: Path, parallel: int) -> Download:
        """Fetch every file."""
        folder = await asyncio.to_thread(make_folder, folder)
        parts = [Part(folder, file) for file in self._wanted.values()]
        for part in parts:
            self._tell(part.file, 0)
        gate = asyncio.Semaphore(parallel)
        there = await _together([_through(gate, lambda part=part: asyncio.to_thread(part.is_there)) for part in parts])
        missing = [part for part, is_there in zip(parts, there, strict=True) if not is_there]
        for part, is_there in zip(parts, there, strict=True):
            self._tell(part.file, part.file.bytes if is_there else 0)
        await asyncio.to_thread(require_room, folder, missing)
        await _together([_through(gate, lambda part=part: self._file(part)) for part in missing])
        files = (
            DownloadedFile(part.target, part.file.bytes, part.file.sha256, not is_there)
            for part, is_there in zip(parts, there, strict=True)
        )
        return Download(folder, tuple(files))

    async def _file(self, part: Part) -> None:
        """Fetch one file; what arrives damaged is fetched once more."""
        for attempt in range(2):
            try:
                await asyncio.to_thread(part.open)
                self._tell(part.file, part.offset)
                await self._bytes(part)
                found = part.sha256()
                if found == part.file.sha256 and part.offset == part.file.bytes:
                    await asyncio.to_thread(part.finish)
                    return
                await asyncio.to_thread(part.discard)
            finally:
                part.close()
            if attempt:
                raise Damaged(
                    f"{part.file.path} arrived twice with another content than the manifest says: sha256 {found}, "
                    f"not {part.file.sha256}; it was not kept"
                )

    async def _bytes(self, part: Part) -> None:
        """Bring the part to its full length, over as many requests as it takes while there is progress."""
        tries, refused_link = Tries(self._patience), None
        while part.offset < part.file.bytes:
            link, before = self._links[part.file.path], part.offset
            verdict, reply = await self._request(part, link)
            if part.offset > before:
                tries.start_again()
                refused_link = None
            match verdict:
                case Verdict.EXPIRED if isinstance(reply, Answer):
                    if refused_link is not None:
                        raise refusal_of(f"GET {part.file.path}", reply)
                    refused_link = link
                    await self._refresh(link)
                case Verdict.REFUSED if isinstance(reply, Answer):
                    raise refusal_of(f"GET {part.file.path}", reply)
                case Verdict.RESTART:
                    await asyncio.to_thread(part.restart, None)
                    await self._pause(tries, part, reply)
                case Verdict.LATER:
                    await self._pause(tries, part, reply)
                case _:
                    pass

    async def _pause(self, tries: Tries, part: Part, reply: Answer | Failed) -> None:
        """Wait before the next try, or give up."""
        tries.failures += 1
        asked = retry_after(reply) if isinstance(reply, Answer) else None
        if tries.failures >= self._patience.tries or (asked or 0.0) > self._patience.longest_asked_s:
            if isinstance(reply, Answer) and reply.status >= 300:
                raise refusal_of(f"GET {part.file.path}", reply)
            last = reply.reason if isinstance(reply, Failed) else f"answered {reply.status} with another range than was asked for"
            raise Unreachable(
                f"{part.file.path}: cut {tries.failures} times at byte {part.offset:,} of {part.file.bytes:,}, last by: {last}; "
                "start the download again and it goes on there"
            )
        await asyncio.sleep(max(asked or 0.0, self._patience.pause(tries.failures)))

    async def _request(self, part: Part, link: str) -> tuple[Verdict, Answer | Failed]:
        """Ask for what the part lacks, and write what comes."""
        # Without the key: the link is its own permission, and may lead to another host.
        request = self._http.build_request("GET", link, headers=headers_for(part.offset, part.tag))
        try:
            response = await self._http.send(request, stream=True, follow_redirects=True)
            try:
                answer = answer_of(response)
                verdict = judge(answer, part.file, part.offset)
                if verdict not in (Verdict.APPEND, Verdict.FROM_START):
                    return verdict, answer_of(response, await _beginning(response))
                if verdict is Verdict.FROM_START:
                    await asyncio.to_thread(part.restart, strong_tag(answer.headers))
                return await self._write(part, response), answer
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            return Verdict.LATER, failed_of(error, request.url.host)

    async def _write(self, part: Part, response: httpx.Response) -> Verdict:
        # As they arrive: collected into larger chunks, the last bytes before a cut would be lost.
        async for chunk in response.aiter_raw():
            room = part.file.bytes - part.offset
            await asyncio.to_thread(part.write, chunk[: room + 1])  # one byte too many is enough to tell
            self._tell(part.file, part.offset)
            if part.offset >= part.file.bytes:
                return Verdict.FROM_START
        raise httpx.ReadError("the answer ended early")

    async def _refresh(self, link: str) -> None:
        """Bring fresh links, unless somebody did since this one was taken."""
        async with self._refreshing:
            if link not in self._links.values():
                return
            manifest = await self._get_manifest()
            if wanted_files(manifest) != self._wanted:
                raise _ManifestChanged
            self._links = _links(manifest)

    def _tell(self, file: WantedFile, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(file.path, done, file.bytes)


def _links(manifest: Manifest) -> dict[str, str]:
    links = {file["path"]: file.get("url", "") for file in manifest["files"]}
    for path, link in links.items():
        parts = urlsplit(link)
        if (
            parts.scheme not in ("", "http", "https")
            or bool(parts.scheme) != bool(parts.netloc)
            or not parts.path.startswith("/")
        ):
            raise UnexpectedAnswer(f"the manifest's link to {path!r} is not one: {link[:200]!r}")
    return links


async def _beginning(response: httpx.Response, most: int = 65_536) -> bytes:
    """Return the first bytes of an answer that says what went wrong."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) >= most:
            break
    return body[:most]


async def _through(gate: asyncio.Semaphore, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async with gate:
        return await work()


async def _together(works: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Do all of them; the first that fails ends the others before it is told."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
