"""The moves a job can make: exactly those of the contract, and terminal statuses are terminal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from jobs.attempts import Success
from jobs.database import UnitOfWork
from jobs.endings import Cause, Hold
from jobs.errors import IllegalMove
from jobs.moves import move
from jobs.status import ALLOWED, HELD, TERMINAL, JobStatus
from tests.jobs.conftest import OWNER, Rows

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus
# Written down from the contract, not read off the code.
LEGAL = {
    (QUEUED, RUNNING), (QUEUED, CANCELLED), (QUEUED, EXPIRED),
    (RUNNING, SUCCEEDED), (RUNNING, FAILED), (RUNNING, CANCELLING), (RUNNING, QUEUED),
    (CANCELLING, CANCELLED),
}  # fmt: skip
PAIRS = list(product(JobStatus, JobStatus))
SUCCESS = Success({}, {}, {}, "artifacts/x/a1/")
CAUSE = Cause("internal", "no", retryable=True)


def test_the_allowed_moves_are_those_of_the_contract():
    allowed = {(origin, target) for origin, targets in ALLOWED.items() for target in targets}

    assert allowed == LEGAL
    assert set(ALLOWED) == set(JobStatus)
    assert {SUCCEEDED, FAILED, CANCELLED, EXPIRED} == TERMINAL
    assert {RUNNING, CANCELLING} == HELD


@pytest.mark.parametrize(("origin", "target"), PAIRS)
def test_a_move_happens_exactly_when_the_contract_knows_it(rows: Rows, origin: JobStatus, target: JobStatus):
    job_id = rows.in_status(origin)
    before = rows.everything(job_id)

    if (origin, target) in LEGAL:
        moved = rows.do(lambda work: move(work.jobs._session, job_id, origin, target, event="job.test"))
        assert moved is not None
        assert rows.job(job_id).status == target
        assert rows.types(job_id)[-1] == "job.test"
    else:
        with pytest.raises(IllegalMove):
            rows.do(lambda work: move(work.jobs._session, job_id, origin, target, event="job.test"))
        assert rows.everything(job_id) == before


@pytest.mark.parametrize("actual", JobStatus)
def test_a_move_from_where_the_job_is_not_changes_nothing(rows: Rows, actual: JobStatus):
    job_id = rows.in_status(actual)
    before = rows.everything(job_id)

    others = [pair for pair in LEGAL if pair[0] != actual]
    moved = [rows.do(lambda work, pair=pair: move(work.jobs._session, job_id, *pair, event="job.test")) for pair in others]

    assert moved == [None] * len(others)
    assert rows.everything(job_id) == before


ACTS: dict[str, Callable[[UnitOfWork, Hold], object]] = {
    "claim": lambda work, hold: work.attempts.claim(hold.job_id, "w", 60.0),
    "renew": lambda work, hold: work.attempts.renew(hold, 60.0),
    "enter_stage": lambda work, hold: work.attempts.enter_stage(hold, "studying", 0.5),
    "advance": lambda work, hold: work.attempts.advance(hold, {"fraction": 0.5}),
    "warn": lambda work, hold: work.attempts.warn(hold, "code", "message"),
    "note_plan": lambda work, hold: work.attempts.note_plan(hold, {"new": True}),
    "note_resolved": lambda work, hold: work.attempts.note_resolved(hold, {"new": True}),
    "succeed": lambda work, hold: work.attempts.succeed(hold, SUCCESS),
    "fail": lambda work, hold: work.attempts.fail(hold, CAUSE, 0.0),
    "cancel": lambda work, hold: work.attempts.cancel(hold),
    "release": lambda work, hold: work.attempts.release(hold),
    "request_cancel": lambda work, hold: work.jobs.request_cancel(OWNER, hold.job_id),
    "expire_leases": lambda work, _: work.upkeep.expire_leases(),
    "expire_runtimes": lambda work, _: work.upkeep.expire_runtimes(-1e6),
    "expire_queued": lambda work, _: work.upkeep.expire_queued(),
    "next_claimable": lambda work, _: work.upkeep.next_claimable("gpu.cpu", 0.0, 10),
}


@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize("act", ACTS)
def test_nothing_changes_a_job_that_is_over(rows: Rows, status: JobStatus, act: str):
    job_id = rows.in_status(status)
    before = rows.everything(job_id)

    rows.do(lambda work: ACTS[act](work, Hold(job_id, fence=1, attempt=1, max_attempts=3)))

    assert rows.everything(job_id) == before


def test_every_act_but_the_upkeep_would_change_a_job_that_is_not_over(rows: Rows):
    for name, act in ACTS.items():
        origin = QUEUED if name in ("claim", "next_claimable", "expire_queued") else CANCELLING if name == "cancel" else RUNNING
        job_id = rows.in_status(origin)
        rows.force(job_id, queue_deadline=rows.job(job_id).created_at, lease_until=rows.job(job_id).created_at)
        rows.force(job_id, run_deadline=rows.job(job_id).created_at, announced_at=rows.job(job_id).created_at)
        before = rows.everything(job_id)

        rows.do(lambda work, act=act, job_id=job_id: act(work, Hold(job_id, fence=1, attempt=1, max_attempts=3)))

        assert rows.everything(job_id) != before, name
        rows.force(job_id, status=SUCCEEDED)
