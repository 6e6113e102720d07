"""Links that carry their own permission: one file of one attempt's artifact, for a quarter of an hour at most.

A link is a path, an expiry and an HMAC over both, made with a key that is derived from the installation's secret
(``jobs/secret.py``). It is what a bucket's presigned link is, for the folder store, so a client downloads the same way
from either.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from api.errors import Problem
from jobs.secret import derived_key
from jobs.settings import Settings

LONGEST_S = 15 * 60


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
    def of(settings: Settings) -> LinkSigner:
        """Use the installation's secret."""
        return LinkSigner(derived_key(settings, "links"))

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
