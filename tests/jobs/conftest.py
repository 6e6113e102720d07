"""A migrated database of its own for every test that asks for one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pytest
from sqlalchemy import select, update

from jobs.attempts import Claim, Success
from jobs.database import UnitOfWork, make_engine, migrate, reader_maker, session_maker, unit_of_work
from jobs.endings import Cause
from jobs.settings import Settings
from jobs.status import HELD, TERMINAL, JobStatus
from jobs.storage import FolderStorage, S3Storage, Storage
from jobs.tables import Job, JobAttempt, JobEvent, no_progress

if TYPE_CHECKING:
    from tests.servers import Postgres

OWNER = "ann"
Answer = TypeVar("Answer")
SUCCESS = Success({"ratio": 4.0}, {"ledger": []}, {"files": [], "bytes": 0}, "artifacts/x/a1/")
PASSING = Cause("download_failed", "cut off", retryable=True)
LASTING = Cause("broken_checkpoint", "a lie", retryable=False)


class Rows:
    """Short words for what the tests do with rows. Every ``do`` is one transaction."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = make_engine(self.settings)
        self.open_session = session_maker(self.engine)
        self.open_reader = reader_maker(self.engine)
        self.announced: list[str] = []

    @contextmanager
    def work(self) -> Iterator[UnitOfWork]:
        with unit_of_work(self.open_session, lambda job_id, _: self.announced.append(job_id)) as work:
            yield work

    def do(self, act: Callable[[UnitOfWork], Answer]) -> Answer:
        with self.work() as work:
            return act(work)

    def add(self, owner: str = OWNER, **columns: Any) -> str:
        return self.do(lambda work: work.jobs.add(a_job(owner, **columns))).job.id

    def claimed(self, lease_s: float = 60.0, **columns: Any) -> Claim:
        claim = self.claim(self.add(**columns), lease_s=lease_s)
        assert claim is not None
        return claim

    def claim(self, job_id: str, worker: str = "w", lease_s: float = 60.0) -> Claim | None:
        return self.do(lambda work: work.attempts.claim(job_id, worker, lease_s))

    def in_status(self, status: JobStatus) -> str:
        """Put a job into a status by force, as if it had got there."""
        job_id = self.add()
        held = {"fence": 1, "worker": "w", "lease_until": None} if status in HELD or status in TERMINAL else {}
        self.force(job_id, status=status, **held)
        return job_id

    def force(self, job_id: str, **columns: Any) -> None:
        with self.open_session() as session, session.begin():
            session.execute(update(Job).where(Job.id == job_id).values(**columns))

    def job(self, job_id: str) -> Job:
        with self.open_reader() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def everything(self, job_id: str) -> dict[str, Any]:
        """All columns of the row, deferred ones included, and the number of its events."""
        with self.open_reader() as session:
            columns = session.execute(select(*Job.__table__.columns).where(Job.id == job_id)).mappings().one()
            return {**columns, "events": len(self.events(job_id))}

    def events(self, job_id: str) -> list[JobEvent]:
        with self.open_reader() as session:
            return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))

    def types(self, job_id: str) -> list[str]:
        return [event.type for event in self.events(job_id)]

    def attempts(self, job_id: str) -> list[JobAttempt]:
        with self.open_reader() as session:
            return list(session.scalars(select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.fence)))


def a_job(owner: str = OWNER, **columns: Any) -> Job:
    """A row as the API would make it."""
    return Job(**{"owner": owner, "model": "m/m", "request": {}, "resolved": {}, "spec_hash": "0", **columns})


DATABASES = ["sqlite", "postgresql"]


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the present schema and no row."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("migrated"))
    migrate(settings)
    return settings.data_dir / "db.sqlite3"


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with the present schema and no row."""
    url = postgres.fresh_url()
    migrate(Settings(data_dir=tmp_path_factory.mktemp("migrated"), database_url=url))
    return url


@pytest.fixture(params=DATABASES)
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of a database without any schema."""
    if request.param == "sqlite":
        return Settings(data_dir=tmp_path / "data")
    return Settings(data_dir=tmp_path / "data", database_url=request.getfixturevalue("postgres").fresh_url())


@pytest.fixture(params=DATABASES)
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rows]:
    if request.param == "sqlite":
        settings = Settings(data_dir=tmp_path / "data")
        settings.data_dir.mkdir()
        shutil.copy(request.getfixturevalue("migrated_sqlite"), settings.data_dir)
    else:
        template = request.getfixturevalue("migrated_postgres")
        settings = Settings(data_dir=tmp_path / "data", database_url=request.getfixturevalue("postgres").fresh_url(template))
    rows = Rows(settings)
    yield rows
    rows.engine.dispose()


def all_at_once(acts: list[Callable[[], Any]]) -> list[Any]:
    """Run every act in a thread of its own, as simultaneously as threads can; return what they returned."""
    barrier, results = threading.Barrier(len(acts)), [None] * len(acts)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = acts[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


WRITES: dict[str, Callable[[UnitOfWork, Claim], Any]] = {
    "renew": lambda work, claim: work.attempts.renew(claim, 60.0),
    "enter_stage": lambda work, claim: work.attempts.enter_stage(claim, "studying", 0.1),
    "advance": lambda work, claim: work.attempts.advance(claim, no_progress() | {"fraction": 0.9}),
    "warn": lambda work, claim: work.attempts.warn(claim, "code", "message"),
    "note_plan": lambda work, claim: work.attempts.note_plan(claim, {"bytes_after": 1}),
    "note_resolved": lambda work, claim: work.attempts.note_resolved(claim, {"revision": "abc"}),
    "succeed": lambda work, claim: work.attempts.succeed(claim, SUCCESS),
    "fail": lambda work, claim: work.attempts.fail(claim, LASTING, 0.0),
    "release": lambda work, claim: work.attempts.release(claim),
}
"""Everything that a worker may write under its claim."""


PREFIX = "artifacts/job_1/a1/"
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(2**20 + 5), "sub/merges.txt": b"a b\n", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with FILES, to be stored under PREFIX."""
    made = tmp_path / "out"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty store, of either kind in turn."""
    kind: Literal["folder", "s3"] = request.param
    if kind == "folder":
        return FolderStorage(tmp_path / "store")
    return S3Storage(Settings(data_dir=tmp_path / "data", **request.getfixturevalue("bucket").settings))
