"""What the rows promise under races, replays, lost workers and late ones."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from jobs.attempts import Claim, Success
from jobs.database import UnitOfWork
from jobs.endings import Cause
from jobs.errors import IdempotencyKeyReused, JobActive, JobNotFound
from jobs.ids import new_job_id, parse_job_id
from jobs.repository import Idempotency, JobFilter
from jobs.status import JobStatus
from jobs.tables import no_progress
from tests.jobs.conftest import OWNER, Rows, a_job

QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobStatus
SUCCESS = Success({"ratio": 4.0}, {"ledger": []}, {"files": [], "bytes": 0}, "artifacts/x/a1/")
PASSING = Cause("download_failed", "cut off", retryable=True)
LASTING = Cause("broken_checkpoint", "a lie", retryable=False)


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


# Ids.


def test_ids_sort_by_time_and_survive_parsing():
    ids = [new_job_id() for _ in range(2000)]

    # The first 13 letters are time, to half a microsecond; within it the order is left to chance.
    assert sorted(ids, key=lambda job_id: job_id[:17]) == ids
    assert len(set(ids)) == len(ids)
    assert [parse_job_id(job_id) for job_id in ids] == ids


def test_an_id_is_a_uuid_of_version_7_with_the_present_millisecond():
    import time
    import uuid

    before = time.time_ns() // 1_000_000
    letters = new_job_id().removeprefix("job_")
    value = 0
    for letter in letters:
        value = value * 32 + "0123456789abcdefghjkmnpqrstvwxyz".index(letter)
    decoded = uuid.UUID(int=value)

    assert (decoded.version, decoded.variant) == (7, uuid.RFC_4122)
    assert before <= value >> 80 <= time.time_ns() // 1_000_000


@pytest.mark.parametrize(
    "text", ["", "job_", "job_x", "art_" + "0" * 26, "job_" + "u" * 26, "job_" + "0" * 27, "job_" + "0" * 25 + "\n"]
)
def test_what_cannot_be_an_id_is_not_found(text: str):
    with pytest.raises(JobNotFound):
        parse_job_id(text)


# Claims.


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


# The fence.

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


# Success, failure, release.


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
    assert rows.do(lambda work: work.upkeep.next_claimable(0.0, 10)) == []
    rows.force(claim.job_id, not_before=rows.job(claim.job_id).created_at)
    assert rows.do(lambda work: work.upkeep.next_claimable(0.0, 10)) == [claim.job_id]
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


# Progress and events.


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


# Idempotency.


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
        with rows.engine.begin() as connection:
            at = (first.job.created_at - timedelta(days=days)).strftime("%Y-%m-%d %H:%M:%S.%f")
            connection.exec_driver_sql("UPDATE idempotency_keys SET created_at = ?", (at,))

    age(6.99)
    assert rows.do(lambda work: work.jobs.add(a_job(), key())).replayed is True
    age(7.01)
    assert rows.do(lambda work: work.jobs.add(a_job(), key())).replayed is False
    age(7.01)
    rows.do(lambda work: work.upkeep.forget_keys())
    assert rows.do(lambda work: work.jobs.replay(key())) is None


def test_the_key_itself_is_not_kept(rows: Rows):
    rows.do(lambda work: work.jobs.add(a_job(), key("a-telling-key")))

    data = b"".join(path.read_bytes() for path in rows.settings.data_dir.glob("db.sqlite3*"))
    assert b"a-telling-key" not in data


# Lists.


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


def test_the_position_in_the_queue_counts_who_came_before(rows: Rows):
    first, second = rows.add(), rows.add()
    running = rows.claimed().job_id

    with rows.work() as work:
        positions = [work.jobs.queue_position(work.jobs.get(OWNER, job_id)) for job_id in (first, second, running)]

    assert positions == [0, 1, None]


# Cancel and delete.


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


# Upkeep.


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

    assert rows.do(lambda work: work.upkeep.next_claimable(10.0, 1)) == [first]
    assert rows.do(lambda work: work.upkeep.next_claimable(10.0, 10)) == [third]
    assert rows.do(lambda work: work.upkeep.next_claimable(10.0, 10)) == []
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
