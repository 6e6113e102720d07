"""S3 through boto3: the client that the store and the sources share, and plain names for what goes wrong.

Address, region and checksums are the operator's settings, never a request's; credentials come from boto3's own chain.
boto3 is imported when the first client is made: that takes longer than an errand on folders, which never needs it.
"""

# boto3 ships without types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any, cast

from jobs.settings import PREFIX, Settings

AT_ONCE = 4
"""Parts of an upload, or files of a download, that are under way at the same time."""
ATTEMPTS = 8
_CONNECTIONS = 16
_CONNECT_S = 5.0
_READ_S = 60.0
_CHUNK = 2**20
_CONTINUATIONS = 8
"""How often a download goes on after a connection that broke."""
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioStorageQuotaExceeded", "InsufficientStorage", "InsufficientCapacity"}
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound", "404"}
_CHANGED = {"PreconditionFailed", "412"}
_REFUSED = {
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed",
    "401", "403",
}  # fmt: skip

for _name in ("botocore", "boto3", "s3transfer", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # their lines about requests hold headers that are signed


class Kind(Enum):
    """What an error of the S3 server or on the way to it comes down to."""

    MISSING = auto()
    CHANGED = auto()
    REFUSED = auto()
    FULL = auto()
    SILENT = auto()
    """It did not answer, or not as it should; it may later."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure and its reason in a few words, which hold no address, no credential and no text of the server's."""

    kind: Kind
    reason: str


class BrokenAnswer(Exception):
    """The server sent something other than what was asked for."""


def open_client(
    settings: Settings, *, endpoint: str | None = None, attempts: int = ATTEMPTS, patience_s: tuple[float, float] | None = None
) -> Any:
    """Return an S3 client that may be shared between threads. ``patience_s``: for a connection, and for each answer."""
    from boto3.session import Session
    from botocore.config import Config
    from botocore.session import get_session

    address = endpoint or settings.s3_endpoint_url
    connect_s, read_s = patience_s or (_CONNECT_S, _READ_S)
    config = Config(
        signature_version="s3v4",
        connect_timeout=connect_s,
        read_timeout=read_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        ignore_configured_endpoint_urls=True,
        s3={"addressing_style": "path" if address else "auto"},
    )
    # A session of its own, for threads may not share one while clients are made; what it reads from disk is shared.
    core = get_session()
    core.register_component("data_loader", _loader())
    return Session(botocore_session=core).client("s3", endpoint_url=address, region_name=settings.s3_region, config=config)


@cache
def _loader() -> Any:
    """Return the reader of boto3's tables: a client takes 0.15 s of processor time with a new one, 0.03 s with this."""
    from botocore.loaders import create_loader

    return create_loader()


def failure_of(error: Exception) -> Failure | None:
    """Return what an error of boto3's comes down to; None for an error that is not one of its own."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        return _answered(cast("Any", error).response)
    if isinstance(
        error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError | exceptions.CredentialRetrievalError
    ):
        return Failure(Kind.REFUSED, "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, BrokenAnswer):
        return Failure(Kind.SILENT, str(error))
    if isinstance(error, exceptions.BotoCoreError | HTTPError):
        return Failure(Kind.SILENT, f"{type(error).__name__}; check {PREFIX}S3_ENDPOINT_URL if it lasts")
    return None


def objects_below(client: Any, bucket: str, prefix: str, *, delimiter: str = "") -> Iterator[dict[str, Any]]:
    """Yield what the server lists: Key, Size, ETag, LastModified; with a delimiter, only what lies at this level."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
    for page in pages:
        # Some servers list folders of their own, as keys that end with a slash.
        yield from (item for item in page.get("Contents", ()) if not item["Key"].endswith("/"))


def md5_of(data: bytes) -> str:
    """Return what ``Content-MD5`` says of a body: the server refuses bytes that changed on their way to it.

    A signature alone does not see to that: it covers the body's hash, and not every server compares it (decision 0023).
    """
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def fill(client: Any, place: Path, *, bucket: str, key: str, etag: str | None = None) -> tuple[int, str]:
    """Write an object to a new file and return its bytes and its sha256.

    With ``etag`` it is that version or an error. A connection that breaks is continued where it broke, by ``Range`` and
    ``If-Match``: of two versions of the object, no file is made.
    """
    from botocore.exceptions import BotoCoreError

    digest, size = hashlib.sha256(), 0
    with place.open("wb") as file:
        for _ in range(_CONTINUATIONS):
            answer = client.get_object(Bucket=bucket, Key=key, **_rest(size, etag))
            if size and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise BrokenAnswer("the server does not serve ranges of bytes, so a download cannot be continued")
            etag, end = answer["ETag"], size + answer["ContentLength"]
            with suppress(BotoCoreError):  # the connection broke; what came is kept
                while chunk := answer["Body"].read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            if size >= end:
                return size, digest.hexdigest()
    raise BrokenAnswer(f"the connection broke {_CONTINUATIONS} times, the last time after {size} bytes")


def _rest(start: int, etag: str | None) -> dict[str, str]:
    ranged = {"Range": f"bytes={start}-"} if start else {}
    return ranged if etag is None else {**ranged, "IfMatch": etag}


def _answered(response: Any) -> Failure:
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{code} ({status})"
    if code in _FULL or status == 507:
        return Failure(Kind.FULL, said)
    if code in _CHANGED or status == 412:
        return Failure(Kind.CHANGED, said)
    if code in _MISSING or status == 404:
        return Failure(Kind.MISSING, said)
    if code in _REFUSED or status in (401, 403):
        return Failure(Kind.REFUSED, f"{said}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and {PREFIX}S3_REGION")
    return Failure(Kind.SILENT, said)
