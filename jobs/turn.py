"""One at a time over the whole database: a lock that goes when its holder does, however that ends."""

from __future__ import annotations

import fcntl
import logging
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

_LOCK = 0x736C6974
"""Of PostgreSQL's advisory locks; any number that nothing else in the database uses."""
_log = logging.getLogger(__name__)


class Turn:
    """On PostgreSQL a lock held by a connection of its own, on SQLite a lock on a file beside the database."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self._engine, self._file = engine, file
        self._connection: Connection | None = None
        self._handle: TextIOWrapper | None = None

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def is_ours(self) -> bool:
        """Say whether it is this process's turn; it takes the turn that nobody has, and keeps it until it ends."""
        if self._engine.dialect.name == "sqlite":
            return self._handle is not None or self._lock_file()
        if self._connection is not None and not self._still_connected(self._connection):
            self.give_up()
        return self._connection is not None or self._lock_database()

    def give_up(self) -> None:
        """Let another have the turn."""
        if self._handle is not None:
            self._handle.close()
        if self._connection is not None:
            # Not back to the pool: the lock belongs to the connection.
            with suppress(SQLAlchemyError):
                self._connection.invalidate()
                self._connection.close()
        self._handle = self._connection = None

    def _lock_file(self) -> bool:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = self._file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return False
        self._handle = handle
        return True

    def _lock_database(self) -> bool:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}):
            self._connection = connection
            return True
        connection.close()
        return False

    def _still_connected(self, connection: Connection) -> bool:
        """A connection that was cut has lost the lock, and somebody else may have it by now."""
        try:
            return connection.scalar(text("SELECT 1")) == 1
        except SQLAlchemyError:
            _log.warning("the database dropped the connection that held the turn")
            return False
