"""What ends an attempt early: a cancel, a stopping worker, the clock, a lost lease. Nothing of it is ever published."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jobs.status import JobStatus
from tests.worker.stand import OWNER, Stand, a_stand, has_ended

LONG = {"blocks": 100_000, "block_s": 0.05}


def cancel(stand: Stand, job_id: str) -> None:
    stand.do(lambda work: work.jobs.request_cancel(OWNER, job_id))


def test_a_running_job_is_cancelled_at_a_blocks_end(stand: Stand):
    worker = stand.start_worker()
    job_id = stand.post(**LONG)
    stand.wait_for_block(job_id)
    child = stand.child_of(worker)
    assert child is not None

    cancel(stand, job_id)
    job = stand.wait_over(job_id)

    assert job.status == JobStatus.CANCELLED
    assert [event.type for event in stand.events(job_id)][-1] == "job.cancelled"
    assert "job.cancelling" in [event.type for event in stand.events(job_id)]
    assert stand.attempts(job_id)[0].outcome == "cancelled"
    stand.wait(lambda: not child.is_running(), "the end of the child")
    assert (stand.stored(job_id), worker.poll()) == ([], None)
    assert stand.wait_over(stand.post()).status == JobStatus.SUCCEEDED  # the worker goes on


def test_a_child_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path):
    with a_stand(tmp_path, CANCEL_GRACE_S=1) as stand:
        worker = stand.start_worker()
        job_id = stand.post(blocks=1, ending="deaf")
        stand.wait_for_block(job_id)
        child = stand.child_of(worker)
        assert child is not None

        cancel(stand, job_id)

        assert stand.wait_over(job_id).status == JobStatus.CANCELLED
        assert not child.is_running()


def test_a_worker_that_is_told_to_stop_gives_its_job_back_unharmed(tmp_path: Path, parts: dict[str, str]):
    with a_stand(tmp_path, **parts) as stand:
        _stop_a_worker_that_works(stand)


def _stop_a_worker_that_works(stand: Stand) -> None:
    first = stand.start_worker("first")
    job_id = stand.post(**LONG, max_attempts=1)
    stand.wait_for_block(job_id)
    child = stand.child_of(first)
    assert child is not None

    first.send_signal(signal.SIGTERM)

    assert first.wait(30) == 0
    assert not child.is_running()
    job = stand.job(job_id)
    assert (job.status, job.attempt, job.worker) == (JobStatus.QUEUED, 1, None)
    assert stand.attempts(job_id)[0].outcome == "released"
    second = stand.start_worker("second")
    stand.wait(lambda: stand.job(job_id).worker == "second", "the second worker's claim")
    assert (stand.job(job_id).fence, stand.job(job_id).attempt, second.poll()) == (2, 1, None)


def test_a_stopping_worker_kills_a_child_that_does_not_listen(tmp_path: Path):
    with a_stand(tmp_path, DRAIN_GRACE_S=1) as stand:
        worker = stand.start_worker()
        job_id = stand.post(blocks=1, ending="deaf")
        stand.wait_for_block(job_id)
        child = stand.child_of(worker)

        worker.send_signal(signal.SIGTERM)

        assert worker.wait(30) == 0
        assert child is not None
        assert not child.is_running()
        assert stand.job(job_id).status == JobStatus.QUEUED


def test_an_attempt_over_its_time_fails(stand: Stand):
    stand.start_worker()

    job = stand.wait_over(stand.post(**LONG, max_runtime_s=2))

    assert job.status == JobStatus.FAILED
    assert job.status_reason is not None
    assert job.status_reason["code"] == "max_runtime"
    assert len(stand.attempts(job.id)) == 1


def test_a_killed_workers_child_dies_with_it_and_another_worker_finishes_the_job(tmp_path: Path):
    with a_stand(tmp_path, LEASE_S=2) as stand:
        stand.start("worker.maintenance")
        first = stand.start_worker("first")
        job_id = stand.post(blocks=40, block_s=0.1)
        stand.wait_for_block(job_id)
        child = stand.child_of(first)
        assert child is not None

        first.kill()
        stand.wait(lambda: has_ended(child), "the end of the child")
        stand.start_worker("second")
        job = stand.wait_over(job_id)

        assert (job.status, job.attempt, job.fence) == (JobStatus.SUCCEEDED, 2, 2)
        lost, won = stand.attempts(job_id)
        assert (lost.outcome, lost.code, won.outcome) == ("lost", "worker_lost", "succeeded")
        assert won.started_at > lost.lease_until
        assert {key.split("/")[2] for key in stand.stored(job_id)} == {"a2"}


@pytest.mark.parametrize("sleepers", ["worker and child", "worker alone"])
def test_a_worker_that_slept_through_its_lease_can_change_nothing(tmp_path: Path, sleepers: str, parts: dict[str, str]):
    with a_stand(tmp_path, LEASE_S=2, **parts) as stand:
        stand.start("worker.maintenance")
        sleeper = stand.start_worker("sleeper")
        job_id = stand.post(blocks=60, block_s=0.1)
        stand.wait_for_block(job_id)
        child = stand.child_of(sleeper)
        assert child is not None
        asleep = [sleeper.pid, child.pid] if sleepers == "worker and child" else [sleeper.pid]
        stand.wait(lambda: _fall_asleep(stand, asleep), "a moment to fall asleep in")

        stand.wait(lambda: stand.job(job_id).status == JobStatus.QUEUED, "the end of the lease")
        if sleepers == "worker alone":
            # Its lease has passed, nobody renews it, so it stops at the end of a block, its worker still asleep.
            stand.wait(lambda: has_ended(child), "the child to stop by itself")
        stand.start_worker("second")
        job = stand.wait_over(job_id)
        published = stand.stored(job_id)
        _wake(asleep)
        stand.wait(lambda: '"interrupted": "lost"' in stand.logs(), "the sleeper to find out")

        assert (job.status, job.fence) == (JobStatus.SUCCEEDED, 2)
        after = stand.job(job_id)
        assert (after.version, after.result, after.artifact_prefix) == (job.version, job.result, f"artifacts/{job_id}/a2/")
        assert stand.stored(job_id) == published
        assert [row.outcome for row in stand.attempts(job_id)] == ["lost", "succeeded"]
        assert len(stand.events(job_id, "job.succeeded")) == 1
        assert sleeper.poll() is None
        assert stand.wait_over(stand.post()).status == JobStatus.SUCCEEDED


def _fall_asleep(stand: Stand, pids: list[int]) -> bool:
    """Stop the processes, but not amid a write: on SQLite that would stop every other writer as well."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if stand.can_write():
        return True
    _wake(pids)
    return False


def _wake(pids: list[int]) -> None:
    """Let the processes go on, the child first: a worker that is awake may have killed and reaped it at once."""
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)


def test_a_job_cancelled_while_its_worker_is_dead_is_cancelled_when_the_lease_ends(tmp_path: Path):
    with a_stand(tmp_path, LEASE_S=2) as stand:
        worker = stand.start_worker()
        job_id = stand.post(**LONG)
        stand.wait_for_block(job_id)
        worker.kill()
        cancel(stand, job_id)

        assert stand.job(job_id).status == JobStatus.CANCELLING
        stand.start("worker.maintenance")

        assert stand.wait_over(job_id).status == JobStatus.CANCELLED
        assert len(stand.attempts(job_id)) == 1
