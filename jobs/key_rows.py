"""Keys in the database, beside those of the settings: made, listed and revoked while the service runs.

Looked up by the hash of what was presented, which has a unique index, and compared once more in constant time. A row
is never removed: a service that has ever had a key is closed to whoever shows none.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Engine, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.errors import SettingsRefused
from jobs.ids import new_id
from jobs.keys import SCOPES, digest, new_key
from jobs.settings import PREFIX, Settings, is_loopback
from jobs.tables import ApiKeyRow

_HINT = 9
"""Letters of a key that are kept readable: the prefix and four more."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that is valid now."""

    owner: str
    scopes: frozenset[str]
    expires_at: datetime | None


class KeyRepository:
    """The keys of the database, over one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, owner: str, scopes: Iterable[str] = SCOPES, days: float | None = None) -> tuple[str, ApiKeyRow]:
        """Make a key and return it with its row; the key itself is kept nowhere."""
        scopes = list(scopes)
        key, _ = new_key(owner, scopes)  # checks name and scopes
        row = ApiKeyRow(
            id=new_id("key_"), owner=owner, scopes={"scopes": scopes}, sha256=digest(key), hint=key[:_HINT],
            expires_at=None if days is None else now(days * 86_400),
        )  # fmt: skip
        self._session.add(row)
        self._session.flush()
        self._session.refresh(row)
        return key, row

    def list(self) -> Sequence[ApiKeyRow]:
        """Return every key, oldest first, revoked ones included."""
        return self._session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.id)).all()

    def revoke(self, key_id: str) -> bool:
        """End a key for good; say whether there was one with this id that was not revoked yet."""
        mine = ApiKeyRow.id == key_id, ApiKeyRow.revoked_at.is_(None)
        ended = update(ApiKeyRow).where(*mine).values(revoked_at=now()).returning(ApiKeyRow.id)
        return self._session.scalar(ended) is not None

    def find(self, sha256: str) -> KnownKey | None:
        """Return the valid key with this hash."""
        row = self._session.scalars(select(ApiKeyRow).where(ApiKeyRow.sha256 == sha256, *_valid())).one_or_none()
        if row is None or not hmac.compare_digest(row.sha256, sha256):
            return None
        return KnownKey(row.owner, frozenset(row.scopes["scopes"]) & frozenset(SCOPES), row.expires_at)

    def are_there_any(self) -> bool:
        """Say whether there is or ever was a key."""
        return self._session.scalar(select(ApiKeyRow.id).limit(1)) is not None

    def are_there_valid_ones(self) -> bool:
        """Say whether anybody can use the service by a key of the database."""
        return self._session.scalar(select(ApiKeyRow.id).where(*_valid()).limit(1)) is not None


def require_keys(settings: Settings, engine: Engine) -> None:
    """Refuse to serve an address that others can reach when there is no valid key, in the settings or the database."""
    if settings.api_keys or is_loopback(settings.host):
        return
    try:
        with Session(engine) as session:
            found = KeyRepository(session).are_there_valid_ones()
    except SQLAlchemyError as error:
        raise SettingsRefused(
            f"{PREFIX}HOST={settings.host} is reachable by others, {PREFIX}API_KEYS is not set, and the database cannot be asked "
            f"for keys ({type(error).__name__}): is it up and migrated (python -m jobs.database)?"
        ) from error
    if not found:
        raise SettingsRefused(
            f"{PREFIX}HOST={settings.host} is reachable by others, and there are no API keys: anyone could run jobs. "
            f"Make one (python -m jobs.keys create NAME), set {PREFIX}API_KEYS, or listen on 127.0.0.1"
        )


def _valid() -> tuple[ColumnElement[bool], ...]:
    return ApiKeyRow.revoked_at.is_(None), or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now())
