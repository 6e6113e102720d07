"""The store in a bucket (decision 0023).

A file's sha256, taken here, is the truth; what a server calls an ETag is its own business. An object appears when its
upload is complete, so nobody ever reads half of one. What a killed upload leaves nobody can read;
``delete`` and ``sweep_uploads`` end it.
"""

# boto3 ships without types.
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from errno import EDQUOT, ENOSPC
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import quote

from compression.errors import DiskFull, SlimtrimError
from jobs.buckets import AT_ONCE, Failure, Kind, failure_of, fill, md5_of, objects_below, open_client
from jobs.errors import StorageUnavailable
from jobs.settings import PREFIX, Settings
from jobs.storage.folder import beside
from jobs.storage.interface import NOTHING_KNOWN, TEMPORARY, KnownObject, ObjectNotFound, checked_parts
from jobs.storage.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    files_below,
    hash_file,
    manifest_bytes,
    manifest_of,
    media_type,
)

_CHUNK = 2**20
_MOST_PARTS = 9000
"""S3 allows 10 000."""
_DELETED_AT_ONCE = 1000
_PROBE_S = (2.0, 5.0)


class S3Storage:
    """A prefix in a bucket."""

    part_bytes = 64 * 2**20
    """A file of more bytes is sent in parts, of which ``AT_ONCE`` are held in memory."""
    copied_whole_bytes = 5 * 10**9
    """A larger object is copied in parts; S3 refuses to copy it whole."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is asked of the server yet."""
        assert settings.bucket is not None
        self._bucket, self._root = settings.bucket
        self._settings = settings
        self._client = open_client(settings)

    def put_artifact(self, prefix: str, folder: Path, known: Mapping[str, KnownObject] = NOTHING_KNOWN) -> Manifest:
        """Store a folder's files under ``prefix``, the manifest last; ``known`` ones are copied by the server."""
        target = self._key(prefix)
        with _named_errors(prefix):
            if self._head(f"{target}/{MANIFEST}") is not None:
                raise StorageUnavailable(f"{prefix!r} is already written, and a prefix is written once")
        try:
            with _named_errors(prefix):
                files = [self._store(path, f"{target}/{name}", name, known.get(name)) for name, path in files_below(folder)]
                manifest = manifest_of(files)
                self._put(manifest_bytes(manifest), self._about(f"{target}/{MANIFEST}", manifest_bytes(manifest)))
        except SlimtrimError:
            with suppress(SlimtrimError):  # a store that fails now may fail here too; the maintenance loop comes again
                self.delete(prefix)
            raise
        return manifest

    def put_file(self, key: str, path: Path) -> ManifestFile:
        """Store one file whole or not at all; equal bytes that are there already are not sent again."""
        place = self._key(key)
        with _named_errors(key):
            if path.is_symlink() or not path.is_file():
                raise StorageUnavailable(f"{path.name!r} is not a file, so it is not stored")
            return self._store(path, place, path.name, KnownObject(key, *hash_file(path)))

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Make ``path`` a copy of an object, whole or not at all; other bytes than ``sha256`` says are StorageUnavailable."""
        place = self._key(key)
        with _named_errors(key), beside(path) as temporary:
            found = fill(self._client, temporary, bucket=self._bucket, key=place)
            if sha256 is not None and found[1] != sha256:
                raise StorageUnavailable(f"{key!r} did not come as it was stored")
            temporary.rename(path)

    def open(self, key: str, start: int = 0) -> BinaryIO:
        """Return an object's bytes as a stream that begins at ``start``."""
        place = self._key(key)
        if 0 < self.size(key) <= start:  # S3 refuses a range without a byte
            return io.BytesIO()
        ranged = {"Range": f"bytes={start}-"} if start else {}
        with _named_errors(key):
            body = self._client.get_object(Bucket=self._bucket, Key=place, **ranged)["Body"]
        return io.BufferedReader(_Stream(body, key), _CHUNK)

    def size(self, key: str) -> int:
        """Return the bytes in an object."""
        place = self._key(key)
        with _named_errors(key):
            head = self._head(place)
            if head is None:
                raise ObjectNotFound(f"there is no object {key!r}")
            return head["ContentLength"]

    def list(self, prefix: str = "") -> list[str]:
        """Return every key below ``prefix``, sorted, those of unfinished artifacts and of unfinished uploads included."""
        below = f"{self._key(prefix)}/" if prefix else self._root and f"{self._root}/"
        with _named_errors(prefix):
            found = {item["Key"] for item in objects_below(self._client, self._bucket, below)}
            found |= {upload["Key"] for upload in self._uploads(below)}
            return sorted(key[len(self._root and f"{self._root}/") :] for key in found)

    def delete(self, prefix: str) -> None:
        """Remove everything below ``prefix``, or the one object of that key; nothing there is fine too.

        The manifest goes first, so that a deletion cut short leaves no artifact rather than half of one.
        """
        place = self._key(prefix)
        with _named_errors(prefix):
            for upload in [*self._uploads(f"{place}/"), *(u for u in self._uploads(place) if u["Key"] == place)]:
                self._abort({"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
            keys = [item["Key"] for item in objects_below(self._client, self._bucket, f"{place}/")]
            if self._head(place) is not None:
                keys.append(place)
            manifest = f"{place}/{MANIFEST}"
            if manifest in keys:
                self._delete([manifest])
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                self._delete(keys[start : start + _DELETED_AT_ONCE])

    def link(self, key: str, expires_s: int, file_name: str, method: Literal["GET", "HEAD"] = "GET") -> str:
        """Return a presigned address; the server ends it by itself, and honours Range and If-Match with its own ETag."""
        named = f"attachment; filename*=UTF-8''{quote(file_name)}"
        about = {"Bucket": self._bucket, "Key": self._key(key), "ResponseContentDisposition": named}
        operation = "get_object" if method == "GET" else "head_object"
        with _named_errors(key):
            return self._public_client.generate_presigned_url(operation, Params=about, ExpiresIn=expires_s)

    def sweep_uploads(self, older_than_s: float) -> int:
        """End uploads in parts that were begun longer ago, and return how many there were."""
        before, below = datetime.now(UTC) - timedelta(seconds=older_than_s), self._root and f"{self._root}/"
        with _named_errors("the store"):
            uploads = [upload for upload in self._uploads(below) if upload["Initiated"] < before]
            for upload in uploads:
                self._abort({"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
            found = objects_below(self._client, self._bucket, f"{below}{TEMPORARY}")  # what a killed check left
            probes = [item["Key"] for item in found if item["LastModified"] < before]
            self._delete(probes[:_DELETED_AT_ONCE])
        return len(uploads) + len(probes)

    def free_bytes(self) -> None:
        """Return None: a bucket does not tell."""

    def check(self) -> None:
        """Write, read back and remove a small object, each once and in a few seconds: who asks wants to know it now."""
        client, place = self._hasty_client, {"Bucket": self._bucket, "Key": self._key(f"{TEMPORARY}{os.urandom(8).hex()}")}
        with _named_errors("the store"):
            client.put_object(**place, Body=b"probe")
            read = client.get_object(**place)["Body"].read()
            client.delete_object(**place)
        if read != b"probe":
            raise StorageUnavailable("the store does not give back what was written")

    @cached_property
    def _public_client(self) -> Any:
        """Makes links with the address at which callers reach the server; sends nothing."""
        return open_client(self._settings, endpoint=self._settings.s3_public_url)

    @cached_property
    def _hasty_client(self) -> Any:
        return open_client(self._settings, attempts=1, patience_s=_PROBE_S)

    def _key(self, key: str) -> str:
        return "/".join([*([self._root] if self._root else []), *checked_parts(key)])

    def _uploads(self, below: str) -> list[Any]:
        """Return the uploads in parts below a prefix that were begun and not ended."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=below)
        return [upload for page in pages for upload in page.get("Uploads", ())]

    def _head(self, place: str) -> Any | None:
        """Return what the server says about an object, None when there is none."""
        try:
            return self._client.head_object(Bucket=self._bucket, Key=place)
        except Exception as error:
            failure = failure_of(error)
            if failure is None or failure.kind is not Kind.MISSING:
                raise
        return None

    def _store(self, path: Path, place: str, name: str, known: KnownObject | None) -> ManifestFile:
        size, sha256 = hash_file(path)
        about = {"Bucket": self._bucket, "Key": place, "ContentType": media_type(name), "Metadata": {"sha256": sha256}}
        if known is None or (known.bytes, known.sha256) != (size, sha256) or not self._copy(known, about):
            self._send(path, size, about)
            self._require(place, size, sha256)
        return ManifestFile(path=name, bytes=size, sha256=sha256, media_type=media_type(name))

    def _copy(self, known: KnownObject, about: dict[str, Any]) -> bool:
        """Let the server copy an object; say whether it was there, under its own key or, already, in its place."""
        place = self._key(known.key)
        head = self._head(place)
        if head is None or not _holds(head, known.bytes, known.sha256):
            return False
        if place != about["Key"]:
            self._copy_object(place, head["ETag"], about)
            self._require(about["Key"], known.bytes, known.sha256)
        return True

    def _copy_object(self, place: str, etag: str, about: dict[str, Any]) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=self.copied_whole_bytes, multipart_chunksize=self.part_bytes, max_concurrency=AT_ONCE
        )
        extra = {name: about[name] for name in ("ContentType", "Metadata")}
        self._client.copy(
            {"Bucket": self._bucket, "Key": place}, about["Bucket"], about["Key"],
            ExtraArgs={**extra, "MetadataDirective": "REPLACE", "CopySourceIfMatch": etag}, Config=config,
        )  # fmt: skip

    def _send(self, path: Path, size: int, about: dict[str, Any]) -> None:
        if size > self.part_bytes:
            self._send_in_parts(path, max(self.part_bytes, -(-size // _MOST_PARTS)), about)
        else:
            self._put(path.read_bytes(), about)

    def _put(self, data: bytes, about: dict[str, Any]) -> None:
        _require_hashed(hashlib.sha256(data).hexdigest(), about)
        self._client.put_object(Body=data, ContentMD5=md5_of(data), **about)

    def _about(self, place: str, data: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(data).hexdigest()
        return {"Bucket": self._bucket, "Key": place, "ContentType": media_type(place), "Metadata": {"sha256": sha256}}

    def _send_in_parts(self, path: Path, length: int, about: dict[str, Any]) -> None:
        upload = {name: about[name] for name in ("Bucket", "Key")}
        upload["UploadId"] = self._client.create_multipart_upload(**about)["UploadId"]
        try:
            parts, sha256 = self._parts(path, length, upload)
            _require_hashed(sha256, about)
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException as error:
            with suppress(Exception):  # what is still there after that is found by sweep_uploads
                self._abort(upload)
            # An answer that got lost and was asked for again: it is done, which the look at the object will show.
            failure = failure_of(error) if isinstance(error, Exception) else None
            if failure is None or failure.kind is not Kind.MISSING:
                raise

    def _parts(self, path: Path, length: int, upload: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """Send every part and return them with the sha256 of what was sent."""
        digest, parts = hashlib.sha256(), list[dict[str, Any]]()
        waiting: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as pool:
            for number, data in enumerate(_pieces(path, length), start=1):
                digest.update(data)
                waiting.append(pool.submit(self._send_part, upload, number, data))
                if len(waiting) == AT_ONCE:
                    parts.append(waiting.popleft().result())
            parts += [sent.result() for sent in waiting]
        return parts, digest.hexdigest()

    def _send_part(self, upload: dict[str, Any], number: int, data: bytes) -> dict[str, Any]:
        answer = self._client.upload_part(**upload, PartNumber=number, Body=data, ContentMD5=md5_of(data))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _abort(self, upload: dict[str, Any]) -> None:
        try:
            self._client.abort_multipart_upload(**upload)
        except Exception as error:
            failure = failure_of(error)
            if failure is None or failure.kind is not Kind.MISSING:  # it may have ended meanwhile
                raise

    def _require(self, place: str, size: int, sha256: str) -> None:
        """Refuse to believe in an upload before the server shows an object of that size."""
        head = self._head(place)
        if head is None or not _holds(head, size, sha256):
            raise StorageUnavailable(f"{place!r} is not what was sent")

    def _delete(self, places: list[str]) -> None:
        if not places:
            return
        objects = {"Objects": [{"Key": place} for place in places], "Quiet": True}
        errors = self._client.delete_objects(Bucket=self._bucket, Delete=objects).get("Errors", [])
        for error in errors:
            if error.get("Code") not in ("NoSuchKey", "404"):
                raise StorageUnavailable(f"{error.get('Key')!r} cannot be removed: {error.get('Code')}")


class _Stream(io.RawIOBase):
    """An object's bytes on their way; what breaks on it is an error of ours."""

    def __init__(self, body: Any, key: str) -> None:
        self._body, self._key = body, key

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _named_errors(self._key):
            data = cast("bytes", self._body.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


def _holds(head: Any, size: int, sha256: str) -> bool:
    """Say whether an object is what was stored; a server that keeps no metadata is asked for the size alone."""
    return head["ContentLength"] == size and head.get("Metadata", {}).get("sha256", sha256) == sha256


def _require_hashed(sha256: str, about: dict[str, Any]) -> None:
    if sha256 != about["Metadata"]["sha256"]:
        raise StorageUnavailable(f"{about['Key']!r} changed while it was stored")


def _pieces(path: Path, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(length):
            yield data


@contextmanager
def _named_errors(what: str) -> Generator[None]:
    """Turn what boto3 and the disk say into an error of ours."""
    try:
        yield
    except SlimtrimError:
        raise
    except Exception as error:
        if (failure := failure_of(error)) is not None:
            raise _error(failure, what) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (ENOSPC, EDQUOT):
            raise DiskFull(f"no room for a copy of {what!r}") from error
        raise StorageUnavailable(f"a file of {what!r} cannot be read or written: {error.strerror}") from error


def _error(failure: Failure, what: str) -> SlimtrimError:
    match failure.kind:
        case Kind.MISSING if "NoSuchBucket" not in failure.reason:
            return ObjectNotFound(f"there is no object {what!r}")
        case Kind.FULL:
            return DiskFull(f"the bucket of {PREFIX}STORAGE_URL has no room for {what!r}: {failure.reason}")
        case Kind.REFUSED:
            return StorageUnavailable(f"the bucket of {PREFIX}STORAGE_URL refuses {what!r}: {failure.reason}")
        case _:
            return StorageUnavailable(f"the bucket of {PREFIX}STORAGE_URL failed at {what!r}: {failure.reason}")
