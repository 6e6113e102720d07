"""The engine, and the one way to write: ``unit_of_work`` commits once, then announces.

SQLite or PostgreSQL; what differs lives here and in ``clock.py``. SQLite is kept in WAL, so that readers and the writer
do not wait for each other; its writers take the lock when they begin (``BEGIN IMMEDIATE``), because a reader that turns
writer midway is refused at once whatever the timeout; ``synchronous=FULL``, because a 201 promises that the job
survives a power cut.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.orm import Session, sessionmaker

from jobs.attempts import AttemptRepository
from jobs.blocks import BlockRepository
from jobs.errors import SchemaOutOfDate
from jobs.events import EventRepository
from jobs.key_rows import KeyRepository
from jobs.reports import ReportRepository
from jobs.repository import JobRepository
from jobs.settings import Settings, load_settings
from jobs.tables import Job
from jobs.upkeep import UpkeepRepository
from jobs.waiting_lines import QueueRepository
from jobs.webhooks import WebhookRepository
from jobs.workers import WorkerRepository

BUSY_TIMEOUT_MS = 10_000
"""Milliseconds a writer waits for another writer."""
_IDLE_MS = 60_000
_WRITES = "slimtrim_writes"
_MIGRATION_LOCK = 0x736C696D
"""Of PostgreSQL's advisory locks; any number that nothing else in the database uses."""
_MIGRATIONS = Path(__file__).parent / "migrations"

OpenSession = Callable[[], Session]
Announce = Callable[[str, str], None]
"""Takes a job's id and its memory class."""


@dataclass(frozen=True, slots=True)
class UnitOfWork:
    """The repositories over one transaction, and the ids to announce once it is committed."""

    jobs: JobRepository
    events: EventRepository
    attempts: AttemptRepository
    upkeep: UpkeepRepository
    blocks: BlockRepository
    queues: QueueRepository
    workers: WorkerRepository
    webhooks: WebhookRepository
    keys: KeyRepository
    reports: ReportRepository
    outbox: list[str] = field(default_factory=list[str])


def make_engine(settings: Settings, *, foreign_keys: bool = True) -> Engine:
    """Return an engine on the settings' database; ``foreign_keys``: whether SQLite looks after them."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    url = settings.resolved_database_url
    if url.startswith("sqlite:"):
        engine = create_engine(url, pool_size=8, max_overflow=56)
        event.listen(engine, "connect", partial(_prepare_sqlite, foreign_keys=foreign_keys))
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    # A connection that the server dropped is noticed before it is used; a transaction that hangs holds its locks a minute.
    options = f"-c idle_in_transaction_session_timeout={_IDLE_MS} -c lock_timeout={BUSY_TIMEOUT_MS} -c timezone=UTC"
    # A machine that vanishes must not keep its locks: the server asks whether a silent connection is still there.
    options += " -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
    arguments = {"connect_timeout": 5, "options": options, "application_name": "slimtrim"}
    return create_engine(url, pool_size=8, max_overflow=24, pool_timeout=10, pool_pre_ping=True, connect_args=arguments)


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
        calls = _calls(session, work.outbox)
    for job_id, memory_class in calls:
        announce(job_id, memory_class)


@contextmanager
def reading(open_session: OpenSession) -> Generator[UnitOfWork]:
    """Give the repositories over a session that is rolled back at the end; for a session from ``reader_maker``."""
    with open_session() as session:
        yield _work_on(session)


def migrate(settings: Settings) -> None:
    """Bring the schema to the present revision. Several processes may ask at once; one does it."""
    with migrating(settings) as connection:
        command.upgrade(alembic_config(connection), "head")


@contextmanager
def migrating(settings: Settings) -> Generator[Connection]:
    """Give a connection on which the schema may be changed, by nobody else at the same time, all of it or nothing."""
    # SQLite changes a table by copying it, and would take the old one's end for that of the rows that refer to it.
    engine = make_engine(settings, foreign_keys=False)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        if engine.dialect.name == "sqlite":
            lock = stack.enter_context((settings.data_dir / "migrate.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        connection = stack.enter_context(engine.execution_options(**{_WRITES: True}).begin())
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        yield connection


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
    return UnitOfWork(
        jobs=JobRepository(session),
        events=EventRepository(session),
        attempts=AttemptRepository(session),
        upkeep=UpkeepRepository(session),
        blocks=BlockRepository(session),
        queues=QueueRepository(session),
        workers=WorkerRepository(session),
        webhooks=WebhookRepository(session),
        keys=KeyRepository(session),
        reports=ReportRepository(session),
    )


def _calls(session: Session, outbox: Sequence[str]) -> list[tuple[str, str]]:
    """Return who is to be announced, in order, and in which class; whoever fills the outbox need not know the class."""
    if not outbox:
        return []
    session.flush()
    found = session.execute(select(Job.id, Job.memory_class).where(Job.id.in_(outbox))).all()
    classes = {row.id: row.memory_class for row in found}
    return [(job_id, classes[job_id]) for job_id in outbox]


def _prepare_sqlite(connection: Any, _record: Any, *, foreign_keys: bool) -> None:
    connection.isolation_level = None  # The driver begins nothing by itself; _begin_sqlite does.
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        f"foreign_keys={int(foreign_keys)}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


if __name__ == "__main__":
    migrate(load_settings())
