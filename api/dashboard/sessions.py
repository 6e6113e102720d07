"""Sessions of the dashboard: a signed cookie for twelve hours, and the token that every form carries.

The cookie names the key that was typed by its SHA-256, the form in which the service keeps it; the key has 256 random bits,
so the hash says nothing that helps to call the API. Nothing is stored here: the hash is looked up at each request, and a key that
was revoked ends its sessions. Without keys a visit has a cookie too, so that its forms have something to be bound to.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from jobs.secret import derived_key
from jobs.settings import Settings

SESSION_S = 12 * 3600
_COOKIE = re.compile(r"(?P<expires>\d{1,12})\.(?P<nonce>[\w-]{22})\.(?P<sha256>[0-9a-f]{64})?\.(?P<seal>[0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Session:
    """One visit, from sign-in to expiry."""

    expires: int
    """Seconds since 1970."""
    nonce: str
    sha256: str | None
    """Of the key that was shown; None where nobody needs one, and before the sign-in."""


class Sessions:
    """Seals sessions into cookies, and opens cookies that were sealed here."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @staticmethod
    def of(settings: Settings) -> Sessions:
        """Use the installation's secret."""
        return Sessions(derived_key(settings, "sessions"))

    def begin(self, sha256: str | None = None) -> Session:
        """Return a fresh session; a sign-in never goes on with the one that was there before it."""
        return Session(int(time.time()) + SESSION_S, secrets.token_urlsafe(16), sha256)

    def seal(self, session: Session) -> str:
        """Return the session as a cookie's value."""
        content = f"{session.expires}.{session.nonce}.{session.sha256 or ''}"
        return f"{content}.{self._sign('session', content)}"

    def open(self, value: str | None) -> Session | None:
        """Return the session of a cookie's value, unless it was changed, was sealed elsewhere, or is over."""
        match = _COOKIE.fullmatch(value or "")
        if match is None:
            return None
        content = f"{match['expires']}.{match['nonce']}.{match['sha256'] or ''}"
        if not hmac.compare_digest(self._sign("session", content), match["seal"]) or int(match["expires"]) < time.time():
            return None
        return Session(int(match["expires"]), match["nonce"], match["sha256"])

    def token(self, session: Session) -> str:
        """Return what the forms of a visit carry; another site cannot know it."""
        return self._sign("form", session.nonce)

    def is_token(self, session: Session, presented: str) -> bool:
        """Say whether a form was made for this visit."""
        return hmac.compare_digest(self.token(session).encode(), presented.encode(errors="replace"))

    def _sign(self, purpose: str, content: str) -> str:
        return hmac.new(self._secret, f"{purpose}\n{content}".encode(), hashlib.sha256).hexdigest()
