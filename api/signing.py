"""Links that carry their own permission: one file of one attempt's artifact, for a quarter of an hour at most.

A link is a path, an expiry and an HMAC over both, made with a secret that never leaves the data folder. It is what a
bucket's presigned link is, for the folder store, so a client downloads the same way from either.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

from api.errors import Problem

LONGEST_S = 15 * 60
_SECRET = "signing.key"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Link:
    """What a link permits: to read this file until then."""

    job_id: str
    artifact: str
    """Which attempt's artifact: the last part of its prefix."""
    path: str
    sha256: str
    expires: int
    """Seconds since 1970."""


class LinkSigner:
    """Makes links and checks them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @staticmethod
    def in_folder(folder: Path) -> LinkSigner:
        """Use the folder's secret, made on first use, readable by its owner alone."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / _SECRET
        if not path.exists():
            _create(path, secrets.token_bytes(_SECRET_BYTES))
        return LinkSigner(path.read_bytes())

    def url(self, link: Link) -> str:
        """Return the link as a reference relative to the service's root."""
        query = {"artifact": link.artifact, "sha256": link.sha256, "expires": link.expires, "signature": self._sign(link)}
        return f"/v1/jobs/{link.job_id}/artifact/files/{quote(link.path)}?{urlencode(query)}"

    def check(self, link: Link, signature: str) -> None:
        """Refuse a link that was not made here, was changed, or is over."""
        if not hmac.compare_digest(self._sign(link).encode(), signature.encode()):
            raise Problem("invalid_api_key", "the signature does not fit this link; take a fresh one from the artifact")
        if link.expires < time.time():
            raise Problem("invalid_api_key", "the link has expired; take a fresh one from the artifact")

    def _sign(self, link: Link) -> str:
        # Every part is free of line feeds or comes last, so two different links never sign the same bytes.
        message = "\n".join(["GET", link.job_id, link.artifact, link.sha256, str(link.expires), link.path])
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()


def expiry() -> int:
    """Return when a link made now ends."""
    return int(time.time()) + LONGEST_S


def _create(path: Path, secret: bytes) -> None:
    """Write the secret whole or not at all; of several processes that start at once, one wins."""
    temporary = path.with_name(f"{_SECRET}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
