"""The callers' side: replays, lists, cancelling and deleting."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from jobs.database import UnitOfWork
from jobs.errors import IdempotencyKeyReused, JobActive, JobNotFound
from jobs.repository import Idempotency, JobFilter
from jobs.status import JobStatus
from jobs.tables import IdempotencyKey
from tests.jobs.conftest import OWNER, SUCCESS, Rows, a_job, all_at_once

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus


def key(text: str = "k", body: str = "b", owner: str = OWNER) -> Idempotency:
    return Idempotency(owner, "POST", "/v1/jobs", text, body)


def test_the_same_key_and_body_give_the_same_job(rows: Rows):
    first = rows.do(lambda work: work.jobs.add(a_job(), key()))
    again = rows.do(lambda work: work.jobs.add(a_job(), key()))

    assert (first.replayed, again.replayed, again.job.id) == (False, True, first.job.id)
    assert len(rows.do(lambda work: work.jobs.list(OWNER)).jobs) == 1


def test_of_many_simultaneous_posts_with_one_key_one_makes_the_job(rows: Rows):
    added = all_at_once([lambda: rows.do(lambda work: work.jobs.add(a_job(), key())) for _ in range(8)])

    assert [result for result in added if isinstance(result, Exception)] == []
    assert len({result.job.id for result in added}) == 1
    assert sum(not result.replayed for result in added) == 1


def test_the_same_key_with_another_body_is_refused_and_makes_nothing(rows: Rows):
    rows.do(lambda work: work.jobs.add(a_job(), key()))

    with pytest.raises(IdempotencyKeyReused):
        rows.do(lambda work: work.jobs.add(a_job(), key(body="other")))
    assert len(rows.do(lambda work: work.jobs.list(OWNER)).jobs) == 1


def test_keys_of_different_callers_and_paths_are_different_keys(rows: Rows):
    mine = rows.do(lambda work: work.jobs.add(a_job(), key()))
    theirs = rows.do(lambda work: work.jobs.add(a_job("bob"), key(owner="bob")))
    elsewhere = rows.do(lambda work: work.jobs.add(a_job(), Idempotency(OWNER, "POST", "/v1/other", "k", "b")))

    assert [mine.replayed, theirs.replayed, elsewhere.replayed] == [False] * 3


def test_a_post_that_failed_has_stored_no_key(rows: Rows):
    def add_and_refuse(work: UnitOfWork) -> None:
        work.jobs.add(a_job(), key())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        rows.do(add_and_refuse)

    assert rows.do(lambda work: work.jobs.add(a_job(), key(body="other"))).replayed is False


def test_a_key_is_forgotten_after_seven_days(rows: Rows):
    first = rows.do(lambda work: work.jobs.add(a_job(), key()))

    def age(days: float) -> None:
        with rows.open_session() as session, session.begin():
            session.execute(update(IdempotencyKey).values(created_at=first.job.created_at - timedelta(days=days)))

    age(6.99)
    assert rows.do(lambda work: work.jobs.add(a_job(), key())).replayed is True
    age(7.01)
    assert rows.do(lambda work: work.jobs.add(a_job(), key())).replayed is False
    age(7.01)
    rows.do(lambda work: work.upkeep.forget_keys())
    assert rows.do(lambda work: work.jobs.replay(key())) is None


def test_the_key_itself_is_not_kept(rows: Rows):
    rows.do(lambda work: work.jobs.add(a_job(), key("a-telling-key")))

    with rows.open_reader() as session:
        kept = session.execute(select(*IdempotencyKey.__table__.columns)).one()
    assert "a-telling-key" not in str(kept)
    assert kept.key_hash == key("a-telling-key").key_hash


def test_pages_are_stable_while_jobs_arrive(rows: Rows):
    old = [rows.add() for _ in range(7)]

    first = rows.do(lambda work: work.jobs.list(OWNER, limit=3))
    new = rows.add()
    second = rows.do(lambda work: work.jobs.list(OWNER, limit=3, after=first.next_cursor))
    third = rows.do(lambda work: work.jobs.list(OWNER, limit=3, after=second.next_cursor))

    assert [job.id for page in (first, second, third) for job in page.jobs] == old[::-1]
    assert third.next_cursor is None
    assert rows.do(lambda work: work.jobs.list(OWNER, limit=3)).jobs[0].id == new


def test_a_full_last_page_has_no_next(rows: Rows):
    rows.add()
    rows.add()

    assert rows.do(lambda work: work.jobs.list(OWNER, limit=2)).next_cursor is None


def test_a_list_is_narrowed_by_status_model_and_labels(rows: Rows):
    a = rows.add(model="a/a", labels={"team": "search", 'odd"name': "1"})
    b = rows.add(model="b/b", labels={"team": "ads"})
    running = rows.claimed(model="a/a").job_id

    def ids(**only: Any) -> set[str]:
        return {job.id for job in rows.do(lambda work: work.jobs.list(OWNER, JobFilter(**only))).jobs}

    assert ids() == {a, b, running}
    assert ids(statuses=[RUNNING]) == {running}
    assert ids(statuses=[RUNNING, QUEUED]) == {a, b, running}
    assert ids(model="a/a") == {a, running}
    assert ids(labels={"team": "search"}) == {a}
    assert ids(labels={'odd"name': "1", "team": "search"}) == {a}
    assert ids(labels={"team": "ads"}, model="a/a") == set()


def test_events_are_paged_by_number(rows: Rows):
    claim = rows.claimed()
    rows.do(lambda work: [work.attempts.warn(claim, "w", "m") for _ in range(5)])

    page = rows.do(lambda work: work.jobs.events(OWNER, claim.job_id, after=2, limit=3))

    assert [event.seq for event in page] == [3, 4, 5]


def test_cancelling_takes_effect_or_says_that_it_came_too_late(rows: Rows):
    def cancel(job_id: str) -> tuple[JobStatus, bool]:
        outcome = rows.do(lambda work: work.jobs.request_cancel(OWNER, job_id))
        return outcome.job.status, outcome.took_effect

    queued, running, done = rows.add(), rows.claimed().job_id, rows.claimed()
    rows.do(lambda work: work.attempts.succeed(done, SUCCESS))

    assert cancel(queued) == cancel(queued) == (CANCELLED, True)
    assert cancel(running) == cancel(running) == (CANCELLING, True)
    assert cancel(done.job_id) == (SUCCEEDED, False)
    assert rows.types(running).count("job.cancelling") == rows.types(queued).count("job.cancelled") == 1
    assert rows.job(running).cancelling_at is not None
    assert rows.job(queued).finished_at is not None


def test_deleting_leaves_a_tombstone_without_content(rows: Rows):
    claim = rows.claimed(request={"calibration": "private"}, labels={"team": "x"})
    rows.do(lambda work: work.attempts.succeed(claim, SUCCESS))

    prefix = rows.do(lambda work: work.jobs.delete(OWNER, claim.job_id))

    row = rows.everything(claim.job_id)
    assert prefix == "artifacts/x/a1/"
    assert (row["request"], row["report"], row["manifest"], row["labels"], row["events"]) == ({}, None, None, {}, 0)
    assert (row["status"], row["spec_hash"]) == (SUCCEEDED, "0")
    assert row["deleted_at"] is not None
    for gone in (rows.do, rows.do):
        with pytest.raises(JobNotFound):
            gone(lambda work: work.jobs.delete(OWNER, claim.job_id))
    assert rows.do(lambda work: work.jobs.list(OWNER, JobFilter(labels={"team": "x"}))).jobs == []


def test_an_active_job_cannot_be_deleted(rows: Rows):
    for job_id in (rows.add(), rows.claimed().job_id):
        with pytest.raises(JobActive):
            rows.do(lambda work, job_id=job_id: work.jobs.delete(OWNER, job_id))
        assert rows.job(job_id).deleted_at is None
