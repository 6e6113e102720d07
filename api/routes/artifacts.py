"""Artifacts: which files there are, and the files, by ranges of bytes.

A file is served to a caller whose key may read the job, or to anyone with a signed link. Its ETag is its sha256, so a
download that was cut continues with ``Range`` and ``If-Match``.

Where artifacts lie in a bucket, no byte of them passes through here: links are presigned by the bucket's credentials, and
the file's own address answers 307 with such a link. Range and conditions are then the S3 server's business, by the ETag that
it makes itself; the sha256 stands in the manifest.
"""

from __future__ import annotations

import base64
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from api.contract import FILE_HEADERS, problems
from api.dependencies import ArtifactReader, LinkHolder, Reader, Running
from api.errors import Problem
from api.headers import names_tag, range_of, require_accept
from api.schemas import ArtifactFile, ArtifactView
from api.service import Service
from api.signing import LONGEST_S, Link, expiry
from api.views import as_json
from jobs.clock import moment
from jobs.database import UnitOfWork
from jobs.ids import parse_job_id
from jobs.storage import Manifest, ManifestFile, Storage, as_manifest, media_type

router = APIRouter(prefix="/v1/jobs/{job_id}/artifact", tags=["artifacts"])

_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that may be served."""

    key: str
    path: str
    sha256: str

    @property
    def tag(self) -> str:
        """The strong ETag: equal for equal bytes."""
        return f'"{self.sha256}"'


@router.get("", response_model=ArtifactView, responses=problems(401, 403, 404, 409, 429))
def get_artifact(request: Request, caller: ArtifactReader, work: Reader, service: Running, job_id: str) -> Response:
    """Return every file of the artifact with its hash, and a link to each that needs no key."""
    require_accept(request.headers, "application/json")
    manifest, prefix, profile = _published(work, caller.name, job_id)
    expires = expiry()
    files = [ArtifactFile(**file, url=_url(service, job_id, prefix, file, expires)) for file in manifest["files"]]
    until = moment(datetime.fromtimestamp(expires, UTC)) or ""
    return as_json(ArtifactView(files=files, bytes=manifest["bytes"], profile=profile, expires_at=until))


@router.get(
    "/files/{path:path}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The range that was asked for.", "content": {"application/octet-stream": {}}},
        304: {"description": "The caller's copy is still right."},
        307: {"description": "The file lies in a bucket; Location is good for a quarter of an hour."},
        **problems(401, 403, 404, 409, 412, 416, 429),
    },
    openapi_extra={"parameters": FILE_HEADERS},
)
def get_file(
    request: Request,
    caller: LinkHolder,
    work: Reader,
    service: Running,
    job_id: str,
    path: str,
    artifact: Annotated[str | None, Query(description="Part of a signed link.", pattern="^[a-z0-9]{1,32}$")] = None,
    sha256: Annotated[str | None, Query(description="Part of a signed link.", pattern="^[0-9a-f]{64}$")] = None,
    expires: Annotated[int | None, Query(description="Part of a signed link.", ge=0, le=2**40)] = None,
    signature: Annotated[str | None, Query(description="Part of a signed link.", pattern="^[0-9a-f]{64}$")] = None,
) -> Response:
    """Return a file of the artifact, whole or one range of it."""
    parse_job_id(job_id)
    if caller is None:
        link = Link(job_id, artifact or "", path, sha256 or "", expires or 0)
        service.signer.check(link, signature or "")
        file = _linked_file(work, link)
    else:
        file = _listed_file(work, caller.name, job_id, path)
    method = "HEAD" if getattr(request.state, "head", False) else "GET"
    url = service.storage.link(file.key, LONGEST_S, PurePosixPath(file.path).name, method)
    if url is not None:
        return Response(status_code=307, headers={"Location": url, "Cache-Control": "no-store"})
    return _serve(request, service.storage, file)


def _url(service: Service, job_id: str, prefix: str, file: ManifestFile, expires: int) -> str:
    name = PurePosixPath(file["path"]).name
    presigned = service.storage.link(f"{prefix}{file['path']}", LONGEST_S, name)
    return presigned or service.signer.url(Link(job_id, _attempt_of(prefix), file["path"], file["sha256"], expires))


def _linked_file(work: UnitOfWork, link: Link) -> StoredFile:
    """Return the file of a link, as long as it is still what the job shows."""
    prefix = f"artifacts/{link.job_id}/{link.artifact}/"
    if not work.upkeep.is_published(link.job_id, prefix):
        raise Problem("not_found", "the artifact of this link has been removed")
    return StoredFile(f"{prefix}{link.path}", link.path, link.sha256)


def _listed_file(work: UnitOfWork, owner: str, job_id: str, path: str) -> StoredFile:
    """Return a file that the manifest lists; no other path ever reaches the store."""
    manifest, prefix, _ = _published(work, owner, job_id)
    for file in manifest["files"]:
        if file["path"] == path:
            return StoredFile(f"{prefix}{path}", path, file["sha256"])
    raise Problem("not_found", f"the artifact has no file {path[:200]!r}; its manifest lists what it has")


def _published(work: UnitOfWork, owner: str, job_id: str) -> tuple[Manifest, str, str]:
    """Return the manifest, the prefix in the store and the profile of a job's artifact."""
    job = work.jobs.get(owner, parse_job_id(job_id))
    manifest = work.jobs.manifest(owner, job_id)
    if manifest is None or job.artifact_prefix is None:
        detail = f"job {job_id} is {job.status}; only a succeeded job has an artifact"
        raise Problem("artifact_not_ready", detail, retryable=not job.is_over)
    return as_manifest(manifest), f"{job.artifact_prefix.rstrip('/')}/", job.request["profile"]


def _attempt_of(prefix: str) -> str:
    return PurePosixPath(prefix).name


def _serve(request: Request, storage: Storage, file: StoredFile) -> Response:
    size = storage.size(file.key)
    headers = _headers(file)
    if (wanted := request.headers.get("if-match")) is not None and not names_tag(wanted, file.tag, weakly=False):
        raise Problem("precondition_failed", f"{file.path!r} is not that file any more", headers={"ETag": file.tag})
    if names_tag(request.headers.get("if-none-match"), file.tag, weakly=True):
        return Response(status_code=304, headers=headers)
    window = range_of(request.headers, size, file.tag)
    start, stop = window or (0, size)
    headers["Content-Length"] = str(stop - start)
    if window is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    status, kind = 200 if window is None else 206, media_type(file.path)
    if getattr(request.state, "head", False):
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(_chunks(storage.open(file.key, start), stop - start), status, headers, media_type=kind)


def _headers(file: StoredFile) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    return {
        "ETag": file.tag,
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(PurePosixPath(file.path).name)}",
    }


def _chunks(stream: BinaryIO, length: int) -> Generator[bytes]:
    with stream:
        while length > 0 and (chunk := stream.read(min(_CHUNK, length))):
            length -= len(chunk)
            yield chunk
