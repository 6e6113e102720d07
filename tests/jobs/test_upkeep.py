"""The service's own side: dead leases, deadlines, and jobs that nobody heard of."""

from __future__ import annotations

from datetime import timedelta

from jobs.status import JobStatus
from tests.jobs.conftest import OWNER, SUCCESS, Rows, all_at_once

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus


def test_a_silent_workers_job_is_queued_again_as_a_lost_attempt(rows: Rows):
    silent, alive = rows.claimed(lease_s=-1.0), rows.claimed(lease_s=60.0)

    requeued = rows.do(lambda work: work.upkeep.expire_leases())

    assert requeued == [silent.job_id]
    job = rows.job(silent.job_id)
    assert (job.status, job.attempt, job.worker, job.lease_until) == (QUEUED, 2, None, None)
    event = rows.events(silent.job_id)[-1]
    assert (event.type, event.data["code"]) == ("job.attempt_failed", "worker_lost")
    assert rows.attempts(silent.job_id)[0].outcome == "lost"
    assert rows.job(alive.job_id).status == RUNNING
    assert rows.do(lambda work: work.upkeep.expire_leases()) == []


def test_a_job_that_loses_every_worker_fails(rows: Rows):
    silent = rows.claimed(lease_s=-1.0, max_attempts=1)

    assert rows.do(lambda work: work.upkeep.expire_leases()) == []

    job = rows.job(silent.job_id)
    assert job.status_reason is not None
    assert (job.status, job.status_reason["code"]) == (FAILED, "attempts_exhausted")
    assert "worker_lost" in job.status_reason["message"]


def test_a_cancelling_job_whose_worker_is_silent_is_cancelled(rows: Rows):
    silent = rows.claimed(lease_s=-1.0)
    rows.do(lambda work: work.jobs.request_cancel(OWNER, silent.job_id))

    rows.do(lambda work: work.upkeep.expire_leases())

    assert rows.job(silent.job_id).status == CANCELLED
    assert rows.attempts(silent.job_id)[0].outcome == "lost"


def test_a_renewal_between_the_upkeeps_look_and_its_act_wins(rows: Rows):
    claim = rows.claimed(lease_s=-1.0)
    seen_dead = rows.job(claim.job_id)
    rows.do(lambda work: work.attempts.renew(claim, 60.0))

    assert rows.do(lambda work: work.upkeep._expire_lease(seen_dead)) is None
    assert (rows.job(claim.job_id).status, rows.attempts(claim.job_id)[0].ended_at) == (RUNNING, None)


def test_of_many_upkeeps_one_ends_an_attempt(rows: Rows):
    silent = rows.claimed(lease_s=-1.0)

    ended = all_at_once([lambda: rows.do(lambda work: work.upkeep.expire_leases()) for _ in range(4)])

    assert sorted(ended) == [[], [], [], [silent.job_id]]
    assert rows.job(silent.job_id).attempt == 2


def test_a_job_expires_only_while_it_has_never_started(rows: Rows):
    waiting, patient = rows.add(max_queue_s=-1), rows.add()
    started = rows.claimed(max_queue_s=3600)
    rows.do(lambda work: work.attempts.release(started))

    assert rows.do(lambda work: work.upkeep.expire_queued()) == [waiting]
    assert rows.job(waiting).status == EXPIRED
    assert rows.job(patient).status == QUEUED
    assert rows.job(started.job_id).queue_deadline is None


def test_a_job_far_over_its_runtime_fails_even_if_its_worker_does_nothing(rows: Rows):
    over, fine = rows.claimed(max_runtime_s=-100), rows.claimed()

    assert rows.do(lambda work: work.upkeep.expire_runtimes(200.0)) == []
    assert rows.do(lambda work: work.upkeep.expire_runtimes(50.0)) == [over.job_id]

    reason = rows.job(over.job_id).status_reason
    assert reason is not None
    assert reason["code"] == "max_runtime"
    assert rows.job(fine.job_id).status == RUNNING


def test_only_jobs_that_nobody_heard_of_are_announced_again_oldest_first(rows: Rows):
    first, second, third = rows.add(), rows.add(), rows.add()
    past = rows.job(first).created_at - timedelta(seconds=100)
    for job_id in (third, first):
        rows.force(job_id, announced_at=past)
    rows.force(rows.claimed().job_id, announced_at=past)

    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 10.0, 1)) == [first]
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 10.0, 10)) == [third]
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 10.0, 10)) == []
    assert rows.job(second).status == QUEUED


def test_files_are_in_use_exactly_while_their_attempt_holds_or_shows_them(rows: Rows):
    claim = rows.claimed()
    in_use = [rows.do(lambda work, fence=fence: work.upkeep.is_held(claim.job_id, fence)) for fence in (0, 1, 2)]
    rows.do(lambda work: work.attempts.succeed(claim, SUCCESS))

    assert in_use == [False, True, False]
    assert rows.do(lambda work: work.upkeep.is_held(claim.job_id, 1)) is False
    assert rows.do(lambda work: work.upkeep.is_published(claim.job_id, "artifacts/x/a1/")) is True
    assert rows.do(lambda work: work.upkeep.is_published(claim.job_id, "artifacts/x/a2/")) is False
    rows.do(lambda work: work.jobs.delete(OWNER, claim.job_id))
    assert rows.do(lambda work: work.upkeep.is_published(claim.job_id, "artifacts/x/a1/")) is False
