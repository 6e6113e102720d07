"""A service of its own: real database, queue, worker processes and maintenance; no HTTP.

It lives in one folder, or on production parts where the settings name them (the fixtures ``production`` and ``parts``).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import select, update

from jobs.database import UnitOfWork, make_engine, migrate, reader_maker, session_maker, unit_of_work
from jobs.queue import Announcer
from jobs.settings import Settings
from jobs.tables import Job, JobAttempt, JobBlock, JobEvent
from jobs.tether import with_our_modules

FAKE = "tests.worker.fakes:compress"
OWNER = "tester"
Answer = TypeVar("Answer")


class Stand:
    """What a test needs to drive workers and to see what they did."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """``settings``: as environment variables without prefix, such as ``LEASE_S=2``."""
        self.folder = folder
        self.model = folder / "models" / "tiny"
        self.model.mkdir(parents=True)
        (self.model / "config.json").write_text("{}")
        fast = {"LEASE_S": 4, "HEARTBEAT_S": 0.5, "RETRY_BACKOFF_S": 0.1, "ANNOUNCE_AFTER_S": 1, "MAINTENANCE_S": 0.2}
        own = {"DATA_DIR": folder / "data", "MODEL_ROOTS": folder / "models", "QUEUE_POLL_S": 0.1, "MIN_FREE_BYTES": 1}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLIMTRIM_")},
            "CUDA_VISIBLE_DEVICES": "",  # several workers share this machine
            **{f"SLIMTRIM_{name}": str(value) for name, value in {**fast, **own, **settings}.items()},
        }
        self.settings = self._read_settings()
        migrate(self.settings)
        engine = make_engine(self.settings)
        self._write, self._read = session_maker(engine), reader_maker(engine)
        self.announcer = Announcer(self.settings)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.relatives: list[psutil.Process] = []
        """Processes that a test saw and that must be gone at its end, though their parent may be gone before."""

    def _read_settings(self) -> Settings:
        names = {name.removeprefix("SLIMTRIM_").lower(): value for name, value in self.environment.items() if "SLIMTRIM_" in name}
        return Settings(**names)

    # What a caller does.

    def post(self, *, announce: bool = True, max_attempts: int = 3, max_runtime_s: int = 600, **plan: Any) -> str:
        """Record a job that the stand-in works on as the plan says, and announce it."""
        request = self.request(**plan) | {"limits": {"max_attempts": max_attempts}}
        return self.post_request(request, announce=announce, max_attempts=max_attempts, max_runtime_s=max_runtime_s)

    def request(self, **plan: Any) -> dict[str, Any]:
        """A request that the stand-in works on as the plan says."""
        return {
            "model": f"file://{self.model}",
            "recipe": {"steps": [{"step": "analyze"}]},
            "calibration": {"source": {"inline": [json.dumps(plan)]}},
            "labels": {"team": "test"},
        }

    def post_request(self, request: dict[str, Any], *, announce: bool = True, **columns: Any) -> str:
        """Record a job for any request."""
        columns = {"resolved": {"revision": None}, "spec_hash": "0", **columns}
        row = Job(owner=OWNER, model=request["model"], request=request, **columns)
        with self.work() as work:
            job = work.jobs.add(row).job
            if announce:
                work.outbox.append(job.id)
        return job.id

    def work(self):
        """One transaction, announced for real."""
        return unit_of_work(self._write, self.announcer.announce)

    def do(self, act: Callable[[UnitOfWork], Answer]) -> Answer:
        """One act in one transaction."""
        with self.work() as work:
            return act(work)

    def change(self, job_id: str, **columns: Any) -> None:
        """Change a row by force."""
        with self._write() as session, session.begin():
            session.execute(update(Job).where(Job.id == job_id).values(**columns))

    def can_write(self) -> bool:
        """Say whether nobody holds the database's lock just now; PostgreSQL has none for all."""
        if not self.settings.resolved_database_url.startswith("sqlite"):
            return True
        with sqlite3.connect(self.settings.data_dir / "db.sqlite3", timeout=1.0, isolation_level=None) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            connection.execute("ROLLBACK")
        return True

    # What a test sees.

    def jobs(self) -> Sequence[Job]:
        """Every row as it is now, oldest first."""
        with self._read() as session:
            return session.scalars(select(Job).order_by(Job.id)).all()

    def parts(self) -> Sequence[JobBlock]:
        """The rows of all finished parts, studies among them."""
        with self._read() as session:
            return session.scalars(select(JobBlock)).all()

    def job(self, job_id: str) -> Job:
        """The row as it is now."""
        with self._read() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def events(self, job_id: str, kind: str | None = None) -> Sequence[JobEvent]:
        """What happened, in order."""
        with self._read() as session:
            rows = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
        return [row for row in rows if kind is None or row.type == kind]

    def attempts(self, job_id: str) -> Sequence[JobAttempt]:
        """Every claim, in order."""
        with self._read() as session:
            return session.scalars(select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.fence)).all()

    def stored(self, job_id: str) -> list[str]:
        """The keys of everything stored for the job."""
        root = self.settings.objects_folder
        return sorted(path.relative_to(root).as_posix() for path in root.glob(f"artifacts/{job_id}/**/*") if path.is_file())

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 180.0) -> Any:
        """Wait until the condition holds; the timeout is for hangs only."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if result := condition():
                return result
            time.sleep(0.02)
        raise AssertionError(f"waited {timeout_s} s in vain for: {what}\n{self.logs()}")

    def wait_over(self, job_id: str, timeout_s: float = 180.0) -> Job:
        """Wait for a terminal status and return the row."""
        self.wait(lambda: self.job(job_id).is_over, f"the end of {job_id}", timeout_s)
        return self.job(job_id)

    def wait_for_block(self, job_id: str) -> None:
        """Wait until the present attempt has finished a block."""
        self.wait(lambda: self.job(job_id).progress["block"], f"a block of {job_id}")

    def unheard(self) -> int:
        """How many announcements wait, in all classes together."""
        waiting = self.announcer.pending()
        assert waiting is not None
        return sum(waiting.values())

    def logs(self) -> str:
        """What all processes logged."""
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    # What runs.

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``python -m <arguments>``; it ends with the test at the latest."""
        log = (self.folder / f"{len(self.processes)}-{arguments[0]}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=with_our_modules(self.environment), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def start_worker(self, name: str = "w", run: str = FAKE, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one worker."""
        return self.start("worker", "--name", name, "--run", run, *arguments)

    def child_of(self, worker: subprocess.Popen[bytes], module: str = "worker.child") -> psutil.Process | None:
        """The process in which the worker's present job runs."""
        with suppress(psutil.Error):
            for process in psutil.Process(worker.pid).children():
                with suppress(psutil.Error):
                    if module in process.cmdline():
                        return process
        return None

    def close(self) -> None:
        """End everything; a process that outlives its parent fails the test."""
        family = list(self.relatives)
        for process in self.processes:
            with suppress(psutil.Error):
                family += psutil.Process(process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.announcer.close()
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
        assert not left, f"processes outlived their worker: {left}"


def has_ended(process: psutil.Process) -> bool:
    """Say whether a process runs no more, be it buried yet or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # buried between the two questions
        return True


@contextmanager
def a_stand(folder: Path, **settings: Any) -> Iterator[Stand]:
    """A stand that is closed at the end."""
    stand = Stand(folder, **settings)
    try:
        yield stand
    finally:
        stand.close()
