"""The last moments of an attempt: what happens between storing the files and the one transaction that publishes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs.logs import Fields
from jobs.status import JobStatus
from tests.worker.stand import FAKE, OWNER, Stand
from worker.attempt import Attempt
from worker.leash import Leash
from worker.room import Room


@pytest.fixture
def room(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> Room:
    """A worker's room in this process; its errands read the stand's settings from the environment."""
    for name, value in stand.environment.items():
        if name.startswith("SLIMTRIM_"):
            monkeypatch.setenv(name, value)
    return Room(stand.settings, "here", FAKE)


def attempt_at(room: Room, stand: Stand, job_id: str, monkeypatch: pytest.MonkeyPatch, just_before: Callable[[], None]) -> Any:
    """Run one attempt; ``just_before`` happens when its files are stored and nothing is published yet."""
    with room.work() as work:
        claim = work.attempts.claim(job_id, "here", 60.0)
    assert claim is not None
    publish = Attempt._publish

    def publish_late(self: Attempt, success: Any) -> Any:
        assert stand.stored(job_id) != []
        just_before()
        return publish(self, success)

    monkeypatch.setattr(Attempt, "_publish", publish_late)
    return Attempt(room, claim, Leash(time.monotonic() + 60.0), Fields(logging.getLogger("test"), {})).run()


def test_a_cancel_that_comes_when_all_is_stored_still_wins(room: Room, stand: Stand, monkeypatch: pytest.MonkeyPatch):
    job_id = stand.post(announce=False)

    def cancel() -> None:
        stand.do(lambda work: work.jobs.request_cancel(OWNER, job_id))

    assert attempt_at(room, stand, job_id, monkeypatch, cancel) == JobStatus.CANCELLED
    job = stand.job(job_id)
    assert (job.status, job.result, job.artifact_prefix) == (JobStatus.CANCELLED, None, None)
    assert stand.stored(job_id) == []


def test_an_attempt_that_lost_its_job_at_the_last_moment_removes_its_files_and_no_others(
    room: Room, stand: Stand, monkeypatch: pytest.MonkeyPatch
):
    job_id = stand.post(announce=False)
    others = stand.settings.objects_folder / f"artifacts/{job_id}/a2/manifest.json"

    def lose() -> None:
        with stand._write() as session, session.begin():
            session.connection().exec_driver_sql("UPDATE jobs SET lease_until = created_at")
        stand.do(lambda work: work.upkeep.expire_leases())
        assert stand.do(lambda work: work.attempts.claim(job_id, "other", 60.0)) is not None
        others.parent.mkdir(parents=True)
        others.write_text("{}")

    assert attempt_at(room, stand, job_id, monkeypatch, lose) is None
    job = stand.job(job_id)
    assert (job.status, job.fence, job.worker, job.result) == (JobStatus.RUNNING, 2, "other", None)
    assert stand.stored(job_id) == [f"artifacts/{job_id}/a2/manifest.json"]


def test_a_commit_whose_answer_got_lost_keeps_its_files(room: Room, stand: Stand, monkeypatch: pytest.MonkeyPatch):
    job_id = stand.post(announce=False)
    persist = Room.persist

    def commit_and_hang_up(self: Room, write: Any) -> Any:
        persist(self, write)
        raise OperationalError("COMMIT", None, Exception("connection lost"))

    attempt_at(room, stand, job_id, monkeypatch, lambda: monkeypatch.setattr(Room, "persist", commit_and_hang_up))

    job = stand.job(job_id)
    assert job.status == JobStatus.SUCCEEDED
    assert f"{job.artifact_prefix}manifest.json" in stand.stored(job_id)


def test_a_database_that_is_away_for_a_moment_costs_nothing(room: Room, stand: Stand, monkeypatch: pytest.MonkeyPatch):
    job_id = stand.post(announce=False)
    work, failures = Room.work, iter([True, True, False])

    def away_twice(self: Room) -> Any:
        if next(failures, False):
            raise OperationalError("BEGIN", None, Exception("database is locked"))
        return work(self)

    status = attempt_at(room, stand, job_id, monkeypatch, lambda: monkeypatch.setattr(Room, "work", away_twice))

    assert status == JobStatus.SUCCEEDED
    assert stand.job(job_id).status == JobStatus.SUCCEEDED
