"""What the rows say about the whole service, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from jobs.census import BLOCK_S, QUEUE_S, RUN_S, Census, Histogram, Settled, take_census
from jobs.tables import JobAttempt, Worker
from tests.jobs.conftest import LASTING, PASSING, SUCCESS, Rows


def census(rows: Rows, settled: Settled | None = None) -> Census:
    with rows.open_reader() as session:
        return take_census(session, 60.0, settled or Settled())


def test_an_empty_service_has_a_census(rows: Rows):
    found = census(rows)

    assert (found.jobs, found.finished, found.attempts.ended) == ({}, {}, {})
    assert (found.workers_alive, found.attempts.bytes_moved) == (0, {"fetched": 0, "stored": 0})


def test_jobs_are_counted_by_status_stage_and_class(rows: Rows):
    rows.add()
    rows.add(memory_class="gpu.80")
    rows.claimed()
    running = rows.claimed()
    rows.do(lambda work: work.attempts.enter_stage(running, "studying", 0.1))

    assert census(rows).jobs == {
        ("queued", "", "gpu.cpu"): 1, ("queued", "", "gpu.80"): 1,
        ("running", "", "gpu.cpu"): 1, ("running", "studying", "gpu.cpu"): 1,
    }  # fmt: skip


def test_the_first_to_wait_says_how_long(rows: Rows):
    for ago_s in (100, 5):
        rows.force(rows.add(), queued_at=datetime.now(UTC) - timedelta(seconds=ago_s))

    waited = census(rows).waiting_s

    assert set(waited) == {"gpu.cpu"}
    assert 100 <= waited["gpu.cpu"] < 160


def test_ends_are_counted_with_their_code_and_attempts_with_their_outcome(rows: Rows):
    succeeded, failed, failing = rows.claimed(), rows.claimed(), rows.claimed()
    rows.do(lambda work: work.attempts.succeed(succeeded, SUCCESS))
    rows.do(lambda work: work.attempts.fail(failed, LASTING, 0.0))
    rows.do(lambda work: work.attempts.fail(failing, PASSING, 0.0))
    rows.claimed(lease_s=-1)
    rows.do(lambda work: work.upkeep.expire_leases())

    found = census(rows)

    assert found.finished == {("succeeded", ""): 1, ("failed", "broken_checkpoint"): 1}
    assert found.attempts.ended == {
        ("succeeded", ""): 1, ("failed", "broken_checkpoint"): 1, ("failed", "download_failed"): 1, ("lost", "worker_lost"): 1,
    }  # fmt: skip
    assert sum(found.attempts.run_s["failed"].counts) == 2


def test_times_fall_into_their_buckets_to_the_bound(rows: Rows):
    claim = rows.claimed()
    at = datetime(2026, 11, 1, tzinfo=UTC)
    with rows.open_session() as session, session.begin():
        attempt = session.get_one(JobAttempt, (claim.job_id, claim.fence))
        attempt.queued_at, attempt.started_at = at, at + timedelta(seconds=20)
        attempt.ended_at, attempt.outcome = at + timedelta(seconds=20 + 100), "succeeded"

    found = census(rows)

    assert found.attempts.run_s["succeeded"].counts.index(1) == RUN_S.index(300.0)
    assert found.attempts.queue_s.counts.index(1) == QUEUE_S.index(30.0)
    assert (found.attempts.run_s["succeeded"].sum, found.attempts.queue_s.sum) == (100, 20)


def test_what_ended_long_ago_is_read_once_and_counted_always(rows: Rows):
    old, recent, running = rows.claimed(), rows.claimed(), rows.claimed()
    for claim, ago_s in ((old, 1000), (recent, 10)):
        rows.do(lambda work, claim=claim: work.attempts.succeed(claim, SUCCESS))
        with rows.open_session() as session, session.begin():
            attempt = session.get_one(JobAttempt, (claim.job_id, claim.fence))
            attempt.ended_at = datetime.now(UTC) - timedelta(seconds=ago_s)
            attempt.started_at = attempt.ended_at - timedelta(seconds=5)
    settled = Settled()

    first = census(rows, settled)
    with rows.open_session() as session, session.begin():
        session.delete(session.get_one(JobAttempt, (old.job_id, old.fence)))
    second = census(rows, settled)

    assert settled.sums.ended == {("succeeded", ""): 1}
    assert first.attempts.ended == second.attempts.ended == {("succeeded", ""): 2}
    assert sum(second.attempts.queue_s.counts) == 3, "a running attempt has waited, too"
    assert running.fence == 1


def test_figures_of_all_attempts_are_added_up_and_peaks_are_not(rows: Rows):
    blocks = Histogram(BLOCK_S)
    blocks.add(0.3)
    blocks.add(7.0)
    for peak in (5, 9, 7):
        claim = rows.claimed()
        figures = {
            "bytes_fetched": 10, "bytes_stored": 3, "gpu_memory_peak": peak,
            "block_seconds": {"studying": {"counts": blocks.counts, "sum": blocks.sum}, "old": {"counts": [1], "sum": 1.0}},
        }  # fmt: skip
        rows.do(lambda work, claim=claim, figures=figures: work.attempts.note_figures(claim, figures))

    found = census(rows)

    assert found.attempts.bytes_moved == {"fetched": 30, "stored": 9}
    assert found.attempts.gpu_memory_peak == 9
    assert found.attempts.block_s["studying"].counts == [3 * count for count in blocks.counts]
    assert found.attempts.block_s["studying"].sum == pytest.approx(21.9)


def test_workers_count_while_they_are_seen(rows: Rows):
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    with rows.open_session() as session, session.begin():
        session.add(Worker(name="a", classes={"classes": ["gpu.cpu", "gpu.80"]}, device="x", job_id="job_1"))
        session.add(Worker(name="b", classes={"classes": ["gpu.cpu"]}, device="x"))
        session.add(Worker(name="c", classes={"classes": ["gpu.cpu"]}, device="x", last_seen=long_ago))

    found = census(rows)

    assert (found.workers_alive, found.workers_busy, found.workers) == (2, 1, {"gpu.cpu": 2, "gpu.80": 1})


def test_a_value_at_a_bound_belongs_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.1):
        histogram.add(value)

    assert histogram.counts == [1, 2, 1]
