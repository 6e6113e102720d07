"""What a job shows while it runs: progress that never goes back, events without gaps."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from jobs.attempts import Claim
from jobs.database import UnitOfWork
from jobs.status import JobStatus
from jobs.tables import no_progress
from tests.jobs.conftest import OWNER, SUCCESS, WRITES, Rows, all_at_once

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus


def test_progress_never_goes_back_within_an_attempt_and_starts_afresh_with_the_next(rows: Rows):
    claim = rows.claimed()
    seen = list[float]()

    for fraction in (0.1, 0.5, 0.3, 0.6, 0.0):
        rows.do(lambda work, fraction=fraction: work.attempts.advance(claim, no_progress() | {"fraction": fraction}))
        seen.append(rows.job(claim.job_id).progress["fraction"])
    rows.do(lambda work: work.attempts.enter_stage(claim, "verifying", 0.2))
    assert rows.job(claim.job_id).progress["fraction"] == 0.6
    rows.do(lambda work: work.attempts.release(claim))
    rows.claim(claim.job_id)

    assert seen == [0.1, 0.5, 0.5, 0.6, 0.6]
    assert rows.job(claim.job_id).progress == no_progress()


def test_a_new_stage_shows_none_of_the_old_ones_blocks(rows: Rows):
    claim = rows.claimed()
    rows.do(lambda work: work.attempts.advance(claim, {"fraction": 0.3, "block": 8, "blocks": 8, "message": "m", "eta_at": None}))

    rows.do(lambda work: work.attempts.enter_stage(claim, "compressing", 0.3))

    job = rows.job(claim.job_id)
    assert (job.stage, job.progress) == ("compressing", no_progress() | {"fraction": 0.3})


def test_progress_events_are_coalesced_and_others_never(rows: Rows):
    claim = rows.claimed()

    def advance_and_warn(work: UnitOfWork) -> None:
        for step in range(200):  # in far less than a second
            work.attempts.advance(claim, no_progress() | {"fraction": step / 4000})
            work.attempts.warn(claim, "w", str(step))

    rows.do(advance_and_warn)

    noted = [event.data["fraction"] for event in rows.events(claim.job_id) if event.type == "job.progress"]
    assert rows.types(claim.job_id).count("job.warning") == 200
    assert rows.job(claim.job_id).progress["fraction"] == 199 / 4000
    assert 5 <= len(noted) < 15  # 0, 0.01, .. 0.04, and one per second that a slow machine may have taken


def test_a_second_later_even_a_small_step_is_noted(rows: Rows):
    claim = rows.claimed()
    rows.do(lambda work: work.attempts.advance(claim, no_progress() | {"fraction": 0.1}))
    rows.force(claim.job_id, noted_at=rows.job(claim.job_id).created_at - timedelta(seconds=2))

    rows.do(lambda work: work.attempts.advance(claim, no_progress() | {"fraction": 0.1001}))

    assert rows.types(claim.job_id).count("job.progress") == 2


def test_events_of_many_writers_are_numbered_without_gaps(rows: Rows):
    claim = rows.claimed()

    all_at_once([lambda: [rows.do(lambda work: work.attempts.warn(claim, "w", "m")) for _ in range(20)] for _ in range(4)])

    assert [event.seq for event in rows.events(claim.job_id)] == list(range(1, 83))
    assert rows.job(claim.job_id).last_seq == 82


@pytest.mark.parametrize("seed", range(5))
def test_any_walk_through_a_jobs_life_leaves_gapless_events_and_one_attempt_per_fence(rows: Rows, seed: int):
    chance = random.Random(seed)
    job_id, claims = rows.add(max_attempts=5), list[Claim]()

    for _ in range(40):
        held = claims[-1] if claims else None
        act = chance.choice(["claim", "claim", *WRITES, "expire", "cancel"])
        if act == "succeed" or (act == "cancel" and chance.random() < 0.8):
            continue
        if act == "claim" and (claim := rows.claim(job_id, lease_s=chance.choice([-1.0, 60.0]))):
            claims.append(claim)
        elif act == "expire":
            rows.do(lambda work: work.upkeep.expire_leases())
        elif act == "cancel":
            rows.do(lambda work: work.jobs.request_cancel(OWNER, job_id))
        elif act in WRITES and held is not None:
            rows.do(lambda work, act=act, held=held: WRITES[act](work, held))

    events = rows.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [row.fence for row in rows.attempts(job_id)] == list(range(1, len(claims) + 1))
    assert sum(event.type == "job.started" for event in events) == len(claims)
    still_open = [row for row in rows.attempts(job_id) if row.ended_at is None]
    assert len(still_open) == (1 if rows.job(job_id).status in (RUNNING, CANCELLING) else 0)
    assert rows.job(job_id).attempt <= 5


def test_a_failed_transaction_leaves_neither_move_nor_event(rows: Rows):
    claim = rows.claimed()
    before = rows.everything(claim.job_id)

    def move_and_refuse(work: UnitOfWork) -> None:
        assert work.attempts.succeed(claim, SUCCESS)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        rows.do(move_and_refuse)

    assert rows.everything(claim.job_id) == before
