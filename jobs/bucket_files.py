"""A model or a text in a bucket: read by ranges of bytes, or downloaded whole.

    s3://bucket/prefix       a model: the objects directly below the prefix
    s3://bucket/key.jsonl    a text

Only what lies below SLIMTRIM_MODEL_BUCKETS is read, on the server that the operator names. Opening notes every file's
size and ETag; each read asks for that ETag, so headers of two versions never mix. The **revision** is a hash over names,
sizes and ETags of the files that a run needs: a job is planned from one and fetches no other (decision 0023).
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from compression.checkpoint.headers import is_plain
from compression.errors import (
    BrokenCheckpoint,
    DiskFull,
    DownloadFailed,
    ModelNotFound,
    SlimtrimError,
    SourceNotAllowed,
    SourceUnavailable,
    ValidationFailed,
)
from jobs.buckets import AT_ONCE, BrokenAnswer, Failure, Kind, failure_of, fill, objects_below, open_client
from jobs.hub import is_wanted
from jobs.settings import PREFIX, Settings

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REVISION = re.compile(r"[0-9a-f]{64}")
_HEAD = 64 * 2**10
"""Bytes read from a shard's start in one go; most headers fit, so most shards cost one request."""
_PREFETCHED = 512
_MOST_FILES = 10_000
_ATTEMPTS = 3
_PATIENCE_S = (5.0, 10.0)
"""For what the API reads while a caller waits: a connection, and each answer."""


class SourceChanged(DownloadFailed):
    """The files in the bucket are not those that the job was planned from. A retry would find the same; a new job helps."""

    retryable = False


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket and a key or prefix in it, without slashes around."""

    bucket: str
    key: str

    @property
    def url(self) -> str:
        """The place as callers write it."""
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]


def parse_place(url: str, pointer: str) -> Place:
    """Return the place that an address names; nothing in it is decoded, and nothing is asked of a server."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket) or not url.isprintable() or "\\" in url:
        raise ValidationFailed(f"{url[:200]!r} is not s3://bucket/prefix", pointer=pointer)
    key = key.removesuffix("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise SourceNotAllowed(f'{url[:200]!r} contains "//", "." or "..", which lead nowhere in a bucket', pointer=pointer)
    return Place(bucket, key)


def require_allowed(place: Place, settings: Settings, pointer: str) -> None:
    """Refuse what does not lie below an entry of SLIMTRIM_MODEL_BUCKETS, compared name by name."""
    if not settings.model_buckets:
        raise SourceNotAllowed(f"no bucket may be read: {PREFIX}MODEL_BUCKETS is empty; list buckets in it", pointer=pointer)
    names = [place.bucket, *place.key.split("/")]
    for entry in settings.model_buckets:
        allowed = entry.removeprefix(SCHEME).strip("/").split("/")
        if names[: len(allowed)] == allowed:
            return
    raise SourceNotAllowed(f"{place.url} does not lie below any entry of {PREFIX}MODEL_BUCKETS", pointer=pointer)


class BucketFiles:
    """The objects directly below a prefix, as they were when it was opened."""

    def __init__(self, client: Any, place: Place, listed: dict[str, tuple[int, str]]) -> None:
        """``listed``: name -> bytes and ETag."""
        self.place = place
        self._client = client
        self._listed = listed
        self._heads: dict[str, bytes] = {}

    @staticmethod
    def open(place: Place, settings: Settings, *, client: Any = None) -> BucketFiles:
        """Return the files that are there now."""
        client = client or open_client(settings, attempts=_ATTEMPTS, patience_s=_PATIENCE_S)
        below = f"{place.key}/" if place.key else ""
        with _named_errors(place, "/model"):
            items = list(islice(objects_below(client, place.bucket, below, delimiter="/"), _MOST_FILES + 1))
        if not items:
            raise ModelNotFound(f"there is nothing at {place.url}", pointer="/model")
        if len(items) > _MOST_FILES:
            raise BrokenCheckpoint(f"{place.url} holds more than {_MOST_FILES} files; no model does")
        listed = {item["Key"][len(below) :]: (int(item["Size"]), str(item["ETag"])) for item in items}
        return BucketFiles(client, place, {name: listed[name] for name in sorted(listed) if is_plain(name)})

    @property
    def revision(self) -> str:
        """The hash that stands for the bytes of the files that a run needs."""
        wanted = [[name, *facts] for name, facts in self._listed.items() if is_wanted(name)]
        return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()

    def names(self) -> list[str]:
        """Return the names of the files, sorted."""
        return list(self._listed)

    def size(self, name: str) -> int:
        """Return the bytes in a file."""
        return self._facts(name)[0]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, fewer only where the file ends."""
        stop = min(start + length, self.size(name))
        if stop <= start:
            return b""
        if start < _HEAD and name not in self._heads:
            self._heads[name] = self._head(name)
        known = self._heads.get(name, b"")[start:stop]
        return known + self._request(name, start + len(known), stop - start - len(known))

    def prefetch(self) -> None:
        """Read the first bytes of every shard side by side."""
        shards = [name for name in self._listed if name.endswith(".safetensors") and is_wanted(name)][:_PREFETCHED]
        with ThreadPoolExecutor(2 * AT_ONCE, thread_name_prefix="bucket") as pool:
            self._heads.update(zip(shards, pool.map(self._head, shards), strict=True))

    def save(self, name: str, destination: Path) -> None:
        """Download one file whole."""
        size, etag = self._facts(name)
        with _unchanged(self.place):
            key = f"{self.place.key}/{name}".lstrip("/")
            came, _ = fill(self._client, destination / name, bucket=self.place.bucket, key=key, etag=etag)
            if came != size:
                raise BrokenAnswer(f"{name!r} has {size} bytes, and {came} came")

    def save_all(self, destination: Path) -> None:
        """Download the files that a run needs, several at once."""

        def save(name: str) -> None:
            self.save(name, destination)

        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bucket")
        try:
            list(pool.map(save, filter(is_wanted, self._listed)))
        finally:
            pool.shutdown(cancel_futures=True)

    def _facts(self, name: str) -> tuple[int, str]:
        if name not in self._listed:
            raise BrokenCheckpoint(f"{self.place.url} has no file {name!r}")
        return self._listed[name]

    def _head(self, name: str) -> bytes:
        return self._request(name, 0, min(_HEAD, self.size(name)))

    def _request(self, name: str, start: int, length: int) -> bytes:
        """Ask for one range; never take more than was asked for, even from a server that sends the whole file."""
        if length <= 0:
            return b""
        with _unchanged(self.place):
            answer = self._client.get_object(
                Bucket=self.place.bucket, Key=f"{self.place.key}/{name}".lstrip("/"), IfMatch=self._facts(name)[1],
                Range=f"bytes={start}-{start + length - 1}",
            )  # fmt: skip
            if start > 0 and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise BrokenAnswer("the server does not serve ranges of bytes")
            with answer["Body"] as body:
                data = body.read(length)
        if len(data) != length:
            raise SourceUnavailable(f"{name!r} at {self.place.url} came incomplete; try again later", pointer="/model")
        return data


def open_model(place: Place, revision: str | None, settings: Settings) -> BucketFiles:
    """Return a model's files with the heads of its shards; refuse another revision than the one that is asked for."""
    require_allowed(place, settings, "/model")
    files = BucketFiles.open(place, settings)
    if (pinned := _pinned(revision)) not in (None, files.revision):
        raise ModelNotFound(f"the files at {place.url} are not those of revision {pinned}", pointer="/revision")
    files.prefetch()
    return files


def download_model(place: Place, revision: str | None, destination: Path, settings: Settings) -> Path:
    """Fill ``destination`` with the weights, configs and tokenizer of a model, and return it."""
    require_allowed(place, settings, "/model")
    try:
        files = BucketFiles.open(place, settings, client=open_client(settings))
        if _pinned(revision) not in (None, files.revision):
            raise SourceChanged(f"the files at {place.url} are not those that the job was planned from; send it again")
        destination.mkdir(parents=True, exist_ok=True)
        files.save_all(destination)
    except _Changed as error:
        raise SourceChanged(f"{place.url} was changed while it was fetched; send the job again") from error
    except SourceUnavailable as error:
        raise DownloadFailed(error.message) from error
    return destination


def check_text(place: Place, settings: Settings, pointer: str) -> None:
    """Refuse a text that is not allowed or not there."""
    require_allowed(place, settings, pointer)
    if not place.key:
        raise ValidationFailed(f"{place.url} is a bucket; name an object in it", pointer=pointer)
    client = open_client(settings, attempts=_ATTEMPTS, patience_s=_PATIENCE_S)
    try:
        with _named_errors(place, pointer):
            client.head_object(Bucket=place.bucket, Key=place.key)
    except ModelNotFound as error:
        raise ValidationFailed(f"there is no object {place.url}", pointer=pointer) from error


def download_text(place: Place, destination: Path, settings: Settings, pointer: str) -> Path:
    """Put a text into the folder, under the last part of its key, and return where it is."""
    require_allowed(place, settings, pointer)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with _named_errors(place, pointer):
            fill(open_client(settings), destination / place.name, bucket=place.bucket, key=place.key)
    except SourceUnavailable as error:
        raise DownloadFailed(error.message) from error
    return destination / place.name


class _Changed(SourceUnavailable):
    """An object has another ETag than when it was listed."""


def _pinned(revision: str | None) -> str | None:
    """Return the revision that is asked for; a bucket has no branches, so the default names what is there."""
    if revision in (None, "main"):
        return None
    if not _REVISION.fullmatch(revision):
        raise ValidationFailed(
            f"{revision[:200]!r} is not the revision of a model in a bucket; leave it out, or give one that a job resolved",
            pointer="/revision",
        )
    return revision


@contextmanager
def _unchanged(place: Place) -> Generator[None]:
    """Name the errors of reading a file that was there when its folder was listed."""
    try:
        with _named_errors(place, "/model"):
            yield
    except ModelNotFound as error:
        raise _Changed(f"a file at {place.url} has been removed while it was read", pointer="/model") from error


@contextmanager
def _named_errors(place: Place, pointer: str) -> Generator[None]:
    """Turn what boto3 and the disk say into an error of ours."""
    try:
        yield
    except SlimtrimError:
        raise
    except Exception as error:
        if (failure := failure_of(error)) is not None:
            raise _error(failure, place, pointer) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room for the files of {place.url}") from error
        raise DownloadFailed(f"the files of {place.url} cannot be written: {error.strerror}") from error


def _error(failure: Failure, place: Place, pointer: str) -> SlimtrimError:
    match failure.kind:
        case Kind.MISSING:
            return ModelNotFound(f"there is nothing at {place.url}", pointer=pointer)
        case Kind.CHANGED:
            return _Changed(f"{place.url} was changed while it was read; send the request again", pointer=pointer)
        case Kind.REFUSED:
            return SourceNotAllowed(f"the server refuses {place.url} to this installation: {failure.reason}", pointer=pointer)
        case _:
            return SourceUnavailable(f"{place.url} cannot be read: {failure.reason}; try again later", pointer=pointer)
