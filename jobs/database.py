"""The engine, and the one way to write: ``unit_of_work`` commits once, then announces.

SQLite specifics live here alone: WAL, so that readers and the writer do not wait for each other; writers that take the
lock when they begin (``BEGIN IMMEDIATE``), because a reader that turns writer midway is refused at once whatever the
timeout; ``synchronous=FULL``, because a 201 promises that the job survives a power cut.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from jobs.attempts import AttemptRepository
from jobs.errors import SchemaOutOfDate
from jobs.repository import JobRepository
from jobs.settings import Settings, load_settings
from jobs.upkeep import UpkeepRepository

BUSY_TIMEOUT_MS = 10_000
"""Milliseconds a writer waits for another writer."""
_WRITES = "slimtrim_writes"
_MIGRATIONS = Path(__file__).parent / "migrations"

OpenSession = Callable[[], Session]
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class UnitOfWork:
    """The repositories over one transaction, and the ids to announce once it is committed."""

    jobs: JobRepository
    attempts: AttemptRepository
    upkeep: UpkeepRepository
    outbox: list[str] = field(default_factory=list[str])


def make_engine(settings: Settings) -> Engine:
    """Return an engine on the settings' database."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(settings.resolved_database_url, pool_size=8, max_overflow=56)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def session_maker(engine: Engine) -> sessionmaker[Session]:
    """Return what opens writing sessions on the engine; rows stay readable after the commit."""
    return sessionmaker(engine.execution_options(**{_WRITES: True}), expire_on_commit=False)


def reader_maker(engine: Engine) -> sessionmaker[Session]:
    """Return what opens sessions that only read; they never wait for a writer."""
    return sessionmaker(engine, expire_on_commit=False)


@contextmanager
def unit_of_work(open_session: OpenSession, announce: Announce) -> Generator[UnitOfWork]:
    """Give one transaction; commit it at the end; announce what it left in the outbox, and only then.

    An explicit list rather than SQLAlchemy's ``after_commit`` event: that listener outlives a rollback, and fires at
    the session's next commit for a job that does not exist.
    """
    with open_session() as session, session.begin():
        work = _work_on(session)
        yield work
    for job_id in work.outbox:
        announce(job_id)


@contextmanager
def reading(open_session: OpenSession) -> Generator[UnitOfWork]:
    """Give the repositories over a session that is rolled back at the end; for a session from ``reader_maker``."""
    with open_session() as session:
        yield _work_on(session)


def migrate(settings: Settings) -> None:
    """Bring the schema to the present revision. Several processes may ask at once; one does it."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = make_engine(settings)
    with (settings.data_dir / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.execution_options(**{_WRITES: True}).begin() as connection:
            command.upgrade(alembic_config(connection), "head")
    engine.dispose()


def schema_is_current(connection: Connection) -> bool:
    """Say whether the database has exactly the schema that this code expects."""
    present = MigrationContext.configure(connection).get_current_heads()
    return set(present) == set(ScriptDirectory.from_config(alembic_config(connection)).get_heads())


def require_current_schema(engine: Engine) -> None:
    """Raise ``SchemaOutOfDate`` unless the database has the schema that this code expects."""
    with engine.connect() as connection:
        if not schema_is_current(connection):
            raise SchemaOutOfDate("the database has another schema than this code; run python -m jobs.database to migrate it")


def alembic_config(connection: Connection) -> Config:
    """Return a configuration that works on an open connection; there is no ini file."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _work_on(session: Session) -> UnitOfWork:
    return UnitOfWork(JobRepository(session), AttemptRepository(session), UpkeepRepository(session))


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # The driver begins nothing by itself; _begin_sqlite does.
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


if __name__ == "__main__":
    migrate(load_settings())
