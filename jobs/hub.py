"""A repository on the Hugging Face hub, read by ranges of bytes or downloaded whole.

Opening pins the branch or tag to a commit, so a job compresses the bytes that its plan was made from, whatever is
pushed meanwhile. Of a shard only the header is read: one request per file, made side by side, since a large model
has more than a hundred shards.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status

from compression.errors import (
    BrokenCheckpoint,
    DiskFull,
    DownloadFailed,
    GatedModel,
    ModelNotFound,
    SlimtrimError,
    SourceUnavailable,
)

WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja"]
"""Weights, configs and tokenizers. Never pickles, never code."""
UNWANTED = ["*/*", "consolidated*"]
"""Sub-folders, and the second copy of the weights that some publishers put beside the first."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEAD = 64 * 2**10
"""Bytes read from a shard's start in one go; most headers fit, so most shards cost one request."""
_AT_ONCE = 8
_PREFETCH_LIMIT = 512
_SECONDS = 10.0
logging.getLogger("httpx2").setLevel(logging.WARNING)  # its lines about requests hold addresses that are signed


class HubFiles:
    """The top-level files of a repository at one commit."""

    def __init__(self, repository: str, commit: str, sizes: dict[str, int | None], token: str | None) -> None:
        self.repository = repository
        self.commit = commit
        self._sizes = sizes
        self._heads: dict[str, bytes] = {}
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    @staticmethod
    def open(repository: str, revision: str, token: str | None) -> HubFiles:
        """Return the files at the commit that ``revision`` names now."""
        with _named_errors(repository, revision):
            info = HfApi(endpoint=_endpoint(), token=token or False).model_info(
                repository, revision=revision, files_metadata=True, timeout=_SECONDS
            )
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise SourceUnavailable(f"the hub did not say which commit {repository!r} is at", pointer="/model")
        siblings = info.siblings or []
        sizes = {file.rfilename: file.size for file in siblings if "/" not in file.rfilename}
        files = HubFiles(repository, info.sha, sizes, token)
        files._prefetch()
        return files

    def names(self) -> list[str]:
        """Return the names of the files at the top level, sorted."""
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """Return the bytes in a file, as the hub states them."""
        if name not in self._sizes:
            raise BrokenCheckpoint(f"{self.repository!r} has no file {name!r}")
        if self._sizes[name] is None:
            self._heads[name] = self._head(name)
        size = self._sizes[name]
        if size is None:
            raise SourceUnavailable(f"the hub did not say how long {name!r} is", pointer="/model")
        return size

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, fewer only where the file ends."""
        stop = min(start + length, self.size(name))
        if stop <= start:
            return b""
        if start < _HEAD and name not in self._heads:
            self._heads[name] = self._head(name)
        head = self._heads.get(name, b"")
        if stop <= len(head):
            return head[start:stop]
        known = head[start:]
        return known + self._request(name, start + len(known), stop - start - len(known))

    def _prefetch(self) -> None:
        """Read the first bytes of every shard side by side."""
        shards = [name for name in self.names() if name.endswith(".safetensors") and not name.startswith("consolidated")]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hub") as pool:
            self._heads.update(zip(shards, pool.map(self._head, shards[:_PREFETCH_LIMIT]), strict=False))

    def _head(self, name: str) -> bytes:
        return self._request(name, 0, _HEAD)

    def _request(self, name: str, start: int, length: int) -> bytes:
        """Ask for one range; never take more than was asked for, even from a server that sends the whole file."""
        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=_endpoint())
        headers = {**self._headers, "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with (
            _named_errors(self.repository, self.commit),
            get_session().stream("GET", url, headers=headers, timeout=_SECONDS, follow_redirects=True) as response,
        ):
            if response.status_code == 416:  # an empty file has no first byte
                self._sizes[name] = self._sizes[name] or 0
                return b""
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.status_code != 206 and start > 0:
                raise SourceUnavailable("the hub does not serve ranges of bytes, so headers cannot be read", pointer="/model")
            self._learn_size(name, response.headers)
            return _take(response, length)

    def _learn_size(self, name: str, headers: httpx2.Headers) -> None:
        total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        if self._sizes[name] is None and total.isdecimal():
            self._sizes[name] = int(total)


def is_wanted(name: str) -> bool:
    """Say whether a file is one that a run needs: weights, a config, a tokenizer."""
    return any(fnmatch(name, wanted) for wanted in WANTED) and not any(fnmatch(name, unwanted) for unwanted in UNWANTED)


def download(repository: str, commit: str, destination: Path, token: str | None) -> Path:
    """Fill ``destination`` with the weights, configs and tokenizer of a repository, and return it."""
    disable_progress_bars()  # they would be drawn into the worker's log
    try:
        with _named_errors(repository, commit):
            HfApi(endpoint=_endpoint(), token=token or False).snapshot_download(  # pyright: ignore[reportUnknownMemberType]
                repository,
                revision=commit,
                local_dir=destination,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                etag_timeout=_SECONDS,
            )
    except SourceUnavailable as error:
        raise DownloadFailed(error.message) from error
    return destination


def _take(response: httpx2.Response, length: int) -> bytes:
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) >= length:
            break
    return bytes(data[:length])


def _endpoint() -> str | None:
    """The hub's address: the operator's setting, never a request's field. None: the public hub."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _named_errors(repository: str, revision: str) -> Generator[None]:
    """Turn whatever the hub's client raises into an error of ours."""
    try:
        yield
    except SlimtrimError:
        raise
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repository!r} has no branch, tag or commit {revision!r}", pointer="/revision") from error
    except GatedRepoError as error:
        raise GatedModel(
            f"{repository!r} is gated: accept its licence on the hub and put a token of that account in SLIMTRIM_HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, DisabledRepoError, HFValidationError) as error:
        raise ModelNotFound(
            f"the hub has no repository {repository!r}, or this installation's token may not see it", pointer="/model"
        ) from error
    except LocalEntryNotFoundError as error:  # what a download says when the hub does not answer
        raise SourceUnavailable(f"the hub did not answer for {repository!r}; try again later", pointer="/model") from error
    except EntryNotFoundError as error:
        raise BrokenCheckpoint(f"a file that {repository!r} lists is missing") from error
    except HfHubHTTPError as error:
        raise _http_error(error, repository) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room for the files of {repository!r}") from error
        raise SourceUnavailable(f"the hub cannot be reached for {repository!r}; try again later", pointer="/model") from error
    except (httpx2.HTTPError, ValueError) as error:  # ValueError: an answer that is not what a hub sends
        raise SourceUnavailable(f"the hub cannot be reached for {repository!r}; try again later", pointer="/model") from error


def _http_error(error: HfHubHTTPError, repository: str) -> SlimtrimError:
    status = error.response.status_code
    if status in (401, 403):
        return GatedModel(f"the hub refuses {repository!r} to this installation ({status}); check SLIMTRIM_HF_TOKEN")
    return SourceUnavailable(f"the hub answered {status} for {repository!r}; try again later", pointer="/model")
