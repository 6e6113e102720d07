"""How a file of an artifact is fetched: which paths are legal, what is asked for, what an answer means. No disk, no socket."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, cast

from slimtrim_client.documents import Manifest
from slimtrim_client.errors import UnexpectedAnswer, UnsafeManifest
from slimtrim_client.messages import TOO_MANY, Answer, Failed
from slimtrim_client.retries import may_be_retried

PART, NOTE = ".part", ".part.json"
"""Endings of what lies beside a file while it is fetched: its first bytes, and what they are the first bytes of."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
# Signed links answer 401, presigned ones 403 or, by some stores, 400; a link to an artifact that was replaced 404 or 410.
_OVER = frozenset({400, 401, 403, 404, 410})


@dataclass(frozen=True)
class WantedFile:
    """A file as the manifest promises it."""

    path: str
    bytes: int
    sha256: str


class Verdict(Enum):
    """What to do about an answer to a request for a file."""

    APPEND = "it goes on where the part ends"
    FROM_START = "it is the whole file"
    RESTART = "the part is of no use; ask for the whole file"
    EXPIRED = "take a fresh link"
    LATER = "try again"
    REFUSED = "give up"


def wanted_files(manifest: Manifest) -> dict[str, WantedFile]:
    """Return the files by path; UnsafeManifest where one must not be written."""
    files: dict[str, WantedFile] = {}
    for entry in cast("list[dict[str, Any]]", manifest.get("files", [])):
        path, size, sha256 = entry.get("path"), entry.get("bytes"), entry.get("sha256")
        if not (isinstance(path, str) and isinstance(size, int) and size >= 0 and isinstance(sha256, str)):
            raise UnexpectedAnswer(f"the manifest has an entry without path, bytes or sha256: {str(entry)[:200]}")
        if not _SHA256.fullmatch(sha256):
            raise UnexpectedAnswer(f"the manifest's sha256 of {path!r} is not one: {sha256[:80]!r}")
        _check_path(path)
        if path in files:
            raise UnsafeManifest(f"the manifest names {path!r} twice; nothing was fetched")
        files[path] = WantedFile(path, size, sha256)
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    if both := sorted(folders & set(files)):
        raise UnsafeManifest(f"the manifest names {both[0]!r} both as a file and as a folder; nothing was fetched")
    return files


def _check_path(path: str) -> None:
    parts = path.split("/")
    wrong = (
        "is empty" if not path
        else "is absolute" if path.startswith("/")
        else "holds a backslash" if "\\" in path
        else "holds a colon" if ":" in path  # a drive, or a stream of another file
        else "holds control characters" if _CONTROLS.search(path)
        else "leads out of its folder" if ".." in parts
        else "has an empty part" if "" in parts or "." in parts
        else "ends as the download's own files do" if path.endswith((PART, NOTE))
        else None
    )  # fmt: skip
    if wrong:
        raise UnsafeManifest(f"the manifest names {path!r}, which {wrong}; nothing was fetched")


def headers_for(offset: int, tag: str | None) -> dict[str, str]:
    """Return the headers that ask for what follows the first ``offset`` bytes of the file that had this tag."""
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if tag is not None:
            headers["If-Match"] = tag
    return headers


def strong_tag(headers: Mapping[str, str]) -> str | None:
    """Return the ETag that stands for these very bytes; None without one."""
    tag = headers.get("etag", "")
    return tag if len(tag) > 2 and tag[0] == tag[-1] == '"' else None


def judge(reply: Answer | Failed, file: WantedFile, offset: int) -> Verdict:
    """Say what an answer to a request from this offset means."""
    if isinstance(reply, Failed):
        return Verdict.LATER
    if reply.status == 200:
        return Verdict.FROM_START
    if reply.status == 206:
        return Verdict.APPEND if offset and _goes_on(reply.headers.get("content-range", ""), file, offset) else Verdict.RESTART
    if reply.status in (412, 416):
        return Verdict.RESTART
    if reply.status in _OVER:
        return Verdict.EXPIRED
    return Verdict.LATER if may_be_retried(reply) or reply.status in (500, TOO_MANY) else Verdict.REFUSED


def _goes_on(content_range: str, file: WantedFile, offset: int) -> bool:
    match = _RANGE.fullmatch(content_range.strip())
    return match is not None and int(match[1]) == offset and match[3] in ("*", str(file.bytes))
