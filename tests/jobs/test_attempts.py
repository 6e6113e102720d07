"""The workers' side: one claim wins, only the holder writes, and an attempt ends one way."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobs.attempts import Claim
from jobs.status import JobStatus
from tests.jobs.conftest import LASTING, OWNER, PASSING, SUCCESS, WRITES, Rows, all_at_once

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus


def test_of_many_workers_with_the_same_message_one_gets_the_job(rows: Rows):
    for _ in range(10):
        job_id = rows.add()

        claims = all_at_once([lambda name=f"w{n}", job_id=job_id: rows.claim(job_id, name) for n in range(6)])

        winners = [claim for claim in claims if claim is not None]
        assert len(winners) == 1
        assert isinstance(winners[0], Claim)
        assert (rows.job(job_id).status, rows.job(job_id).fence, len(rows.attempts(job_id))) == (RUNNING, 1, 1)


def test_a_doubled_message_finds_nothing_to_claim(rows: Rows):
    claim = rows.claimed()

    assert rows.claim(claim.job_id, "other") is None
    assert rows.job(claim.job_id).worker == "w"


def test_a_claim_and_a_cancel_that_race_agree_on_the_outcome(rows: Rows):
    outcomes = set[JobStatus]()
    for _ in range(15):
        job_id = rows.add()

        claim, cancel = all_at_once(
            [
                lambda job_id=job_id: rows.claim(job_id),
                lambda job_id=job_id: rows.do(lambda work: work.jobs.request_cancel(OWNER, job_id)),
            ]
        )

        assert cancel.took_effect
        outcomes.add(rows.job(job_id).status)
        assert rows.job(job_id).status == (CANCELLED if claim is None else CANCELLING)
    assert outcomes <= {CANCELLED, CANCELLING}


def test_a_claim_starts_the_clocks_and_raises_the_fence(rows: Rows):
    claim = rows.claimed(max_runtime_s=100)
    job = rows.job(claim.job_id)

    assert (claim.fence, claim.attempt, job.worker, job.queue_deadline) == (1, 1, "w", None)
    assert job.lease_until is not None
    assert job.started_at is not None
    assert job.run_deadline is not None
    # Set in one UPDATE by one clock, each at its own reading of it.
    assert abs(job.lease_until - job.started_at - timedelta(seconds=60)) < timedelta(seconds=1)
    assert abs(job.run_deadline - job.started_at - timedelta(seconds=100)) < timedelta(seconds=1)


@pytest.mark.parametrize("write", WRITES)
def test_a_worker_that_lost_its_job_can_write_nothing(rows: Rows, write: str):
    late = rows.claimed(lease_s=-1.0)
    rows.do(lambda work: work.upkeep.expire_leases())
    present = rows.claim(late.job_id, "other")
    assert present is not None
    before = rows.everything(late.job_id)

    refused = rows.do(lambda work: WRITES[write](work, late))

    assert refused in (None, False)
    assert rows.everything(late.job_id) == before
    assert rows.attempts(late.job_id)[1].ended_at is None
    assert rows.do(lambda work: WRITES[write](work, present)) not in (None, False)
    assert rows.everything(late.job_id) != before or write == "renew"


@pytest.mark.parametrize("write", WRITES)
def test_a_worker_whose_job_waits_again_can_write_nothing(rows: Rows, write: str):
    late = rows.claimed(lease_s=-1.0)
    rows.do(lambda work: work.upkeep.expire_leases())
    before = rows.everything(late.job_id)

    assert rows.do(lambda work: WRITES[write](work, late)) in (None, False)
    assert rows.everything(late.job_id) == before


def test_a_late_cancel_of_the_old_worker_does_not_end_the_new_ones_attempt(rows: Rows):
    late = rows.claimed(lease_s=-1.0)
    rows.do(lambda work: work.upkeep.expire_leases())
    rows.claim(late.job_id, "other")
    rows.do(lambda work: work.jobs.request_cancel(OWNER, late.job_id))

    assert rows.do(lambda work: work.attempts.cancel(late)) is None
    assert rows.job(late.job_id).status == CANCELLING


def test_success_is_published_all_at_once(rows: Rows):
    claim = rows.claimed()

    assert rows.do(lambda work: work.attempts.succeed(claim, SUCCESS))

    job = rows.job(claim.job_id)
    assert (job.status, job.result, job.artifact_prefix, job.progress["fraction"]) == (
        SUCCEEDED,
        {"ratio": 4.0},
        "artifacts/x/a1/",
        1.0,
    )
    assert (job.lease_until, job.worker, job.stage, job.status_reason) == (None, None, None, None)
    assert rows.do(lambda work: work.jobs.report(OWNER, job.id)) == {"ledger": []}
    assert rows.do(lambda work: work.jobs.manifest(OWNER, job.id)) == {"files": [], "bytes": 0}
    assert rows.attempts(job.id)[0].outcome == "succeeded"
    assert rows.do(lambda work: work.attempts.succeed(claim, SUCCESS)) is False


def test_a_job_that_was_to_be_cancelled_does_not_succeed(rows: Rows):
    claim = rows.claimed()
    rows.do(lambda work: work.jobs.request_cancel(OWNER, claim.job_id))

    assert rows.do(lambda work: work.attempts.succeed(claim, SUCCESS)) is False
    assert rows.do(lambda work: work.attempts.cancel(claim)) == CANCELLED
    assert rows.job(claim.job_id).result is None
    assert rows.attempts(claim.job_id)[0].outcome == "cancelled"


def test_a_passing_failure_is_tried_again_until_the_attempts_are_used_up(rows: Rows):
    job_id = rows.add(max_attempts=3)

    for attempt in (1, 2):
        claim = rows.claim(job_id)
        assert claim is not None
        assert claim.attempt == attempt
        assert rows.do(lambda work, claim=claim: work.attempts.fail(claim, PASSING, 0.0)) == QUEUED
    last = rows.claim(job_id)
    assert last is not None
    assert rows.do(lambda work: work.attempts.fail(last, PASSING, 0.0)) == FAILED

    reason = rows.job(job_id).status_reason
    assert reason is not None
    assert (reason["code"], reason["retryable"]) == ("attempts_exhausted", False)
    assert "download_failed" in reason["message"]
    assert [row.code for row in rows.attempts(job_id)] == ["download_failed"] * 3
    assert rows.types(job_id).count("job.attempt_failed") == 2
    assert rows.types(job_id)[-1] == "job.failed"


def test_a_lasting_failure_is_not_tried_again(rows: Rows):
    claim = rows.claimed()

    assert rows.do(lambda work: work.attempts.fail(claim, LASTING, 0.0)) == FAILED
    assert rows.job(claim.job_id).status_reason == {"code": "broken_checkpoint", "message": "a lie", "retryable": False}


def test_a_failed_attempt_waits_before_the_next(rows: Rows):
    claim = rows.claimed()

    rows.do(lambda work: work.attempts.fail(claim, PASSING, 3600.0))

    assert rows.claim(claim.job_id) is None
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 0.0, 10)) == []
    rows.force(claim.job_id, not_before=rows.job(claim.job_id).created_at)
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 0.0, 10)) == [claim.job_id]
    assert rows.claim(claim.job_id) is not None


def test_a_released_job_has_lost_no_attempt(rows: Rows):
    claim = rows.claimed(max_attempts=1)

    assert rows.do(lambda work: work.attempts.release(claim)) == QUEUED

    again = rows.claim(claim.job_id)
    assert again is not None
    assert (again.attempt, again.fence) == (1, 2)
    assert rows.attempts(claim.job_id)[0].outcome == "released"
    assert "job.requeued" in rows.types(claim.job_id)


@pytest.mark.parametrize("act", ["fail", "release"])
def test_a_job_that_is_to_be_cancelled_ends_cancelled_however_its_attempt_ends(rows: Rows, act: str):
    claim = rows.claimed()
    rows.do(lambda work: work.jobs.request_cancel(OWNER, claim.job_id))

    assert rows.do(lambda work: WRITES[act](work, claim)) == CANCELLED


def test_a_renewal_prolongs_the_lease_and_brings_news(rows: Rows):
    claim = rows.claimed(lease_s=1.0)
    first = rows.job(claim.job_id)

    assert rows.do(lambda work: work.attempts.renew(claim, 600.0)) == RUNNING
    renewed = rows.job(claim.job_id)
    rows.do(lambda work: work.jobs.request_cancel(OWNER, claim.job_id))

    assert renewed.lease_until > first.lease_until + timedelta(seconds=500)
    assert rows.attempts(claim.job_id)[0].lease_until == renewed.lease_until
    assert renewed.version == first.version  # no visible change, no new ETag
    assert rows.do(lambda work: work.attempts.renew(claim, 600.0)) == CANCELLING
