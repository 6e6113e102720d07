"""The transaction and what follows it: commit first, then announce; writers that wait instead of failing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from jobs.clock import UtcTime, now
from jobs.database import make_engine, reading, unit_of_work
from jobs.errors import JobNotFound
from jobs.settings import Settings
from jobs.tables import Job, JobLabel
from tests.jobs.conftest import OWNER, Rows, a_job


def test_a_job_is_announced_after_it_is_committed(rows: Rows):
    seen: list[str] = []

    def announce(job_id: str, memory_class: str) -> None:
        assert memory_class == "gpu.24g"
        seen.append(rows.job(job_id).id)  # through another connection: only what is committed is there

    with unit_of_work(rows.open_session, announce) as work:
        job_id = work.jobs.add(a_job(memory_class="gpu.24g")).job.id
        work.outbox.append(job_id)
        assert seen == []

    assert seen == [job_id]


def test_a_transaction_that_fails_announces_nothing_and_neither_does_the_next(rows: Rows):
    class Refused(Exception): ...

    def add_and_refuse() -> None:
        with rows.work() as work:
            work.outbox.append(work.jobs.add(a_job()).job.id)
            raise Refused

    with pytest.raises(Refused):
        add_and_refuse()
    rows.do(lambda work: work.jobs.list(OWNER))

    assert rows.announced == []
    assert rows.do(lambda work: work.jobs.list(OWNER)).jobs == []


def test_the_outbox_is_announced_in_order(rows: Rows):
    with rows.work() as work:
        ids = [work.jobs.add(a_job()).job.id for _ in range(5)]
        work.outbox.extend(reversed(ids))

    assert rows.announced == ids[::-1]


def test_two_writers_that_read_first_both_get_through(rows: Rows):
    barrier, errors = threading.Barrier(2), list[Exception]()

    def read_then_write() -> None:
        try:
            barrier.wait()
            with rows.work() as work:
                work.jobs.list(OWNER)
                work.jobs.add(a_job())
        except Exception as error:
            errors.append(error)

    _together([read_then_write] * 2, times=10)

    assert errors == []
    assert len(rows.do(lambda work: work.jobs.list(OWNER, limit=100)).jobs) == 20


def test_a_reader_does_not_wait_for_a_writer(rows: Rows):
    job_id = rows.add()

    with rows.work() as work:
        work.jobs.request_cancel(OWNER, job_id)
        with reading(rows.open_reader) as others:
            seen = others.jobs.get(OWNER, job_id).status

    assert seen == "queued"


def test_rows_stay_readable_after_the_commit(rows: Rows):
    with rows.work() as work:
        job = work.jobs.add(a_job(labels={"team": "search"})).job

    assert (job.status, job.labels, job.created_at.tzinfo) == ("queued", {"team": "search"}, UTC)


def test_a_row_that_points_nowhere_is_refused(rows: Rows):
    with pytest.raises(IntegrityError), rows.engine.begin() as connection:
        connection.execute(insert(JobLabel).values(job_id="job_of_nobody", name="a", value="b"))


def test_sqlite_keeps_what_it_committed_and_lets_readers_read(tmp_path: Path):
    with make_engine(Settings(data_dir=tmp_path)).connect() as connection:
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(text("PRAGMA busy_timeout")) == 10_000


def test_the_database_orders_its_own_times_and_ours_alike(rows: Rows):
    with rows.engine.connect() as connection:
        present = connection.scalar(select(now()))
        later, earlier = connection.execute(select(now(90.5), now(-90.5))).one()

    assert present is not None
    assert present.tzinfo is UTC
    assert abs(present - datetime.now(UTC)) < timedelta(minutes=1)  # the same machine's clock, generously
    # Three readings of one clock within one or two statements.
    assert abs((later - earlier).total_seconds() - 181.0) < 1.0
    assert earlier < present < later


def test_times_come_back_as_the_same_moment_from_any_zone(rows: Rows):
    east = datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=timezone(timedelta(hours=9)))
    job_id = rows.add()

    rows.force(job_id, lease_until=east)

    assert rows.job(job_id).lease_until == east
    with rows.open_reader() as session:
        compared = session.scalar(select(Job.lease_until > now()).where(Job.id == job_id))
    assert compared is (east > datetime.now(UTC))
    assert UtcTime().process_bind_param(None, rows.engine.dialect) is None


def test_another_owner_sees_nothing(rows: Rows):
    job_id = rows.add()

    for call in (
        lambda work: work.jobs.get("bob", job_id),
        lambda work: work.jobs.events("bob", job_id),
        lambda work: work.jobs.attempts("bob", job_id),
        lambda work: work.jobs.report("bob", job_id),
        lambda work: work.jobs.manifest("bob", job_id),
        lambda work: work.jobs.request_cancel("bob", job_id),
        lambda work: work.jobs.delete("bob", job_id),
    ):
        with pytest.raises(JobNotFound):
            rows.do(call)
    assert rows.do(lambda work: work.jobs.list("bob")).jobs == []


def _together(acts: list[Callable[[], None]], times: int) -> None:
    for _ in range(times):
        threads = [threading.Thread(target=act) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
