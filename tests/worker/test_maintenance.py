"""The service's own upkeep: what is in use stays, what nobody owns goes, and the queue is not flooded."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobs.attempts import Success
from jobs.status import JobStatus
from tests.worker.stand import Stand
from worker.maintenance import HEARD_AT_MOST, Maintenance


@pytest.fixture
def maintenance(stand: Stand) -> Maintenance:
    return Maintenance(stand.settings)


def put(stand: Stand, path: str) -> None:
    place = stand.settings.data_dir / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("x")


def test_cleaning_keeps_what_is_held_or_published_and_removes_the_rest(stand: Stand, maintenance: Maintenance):
    running = stand.post(announce=False)
    stand.do(lambda work: work.attempts.claim(running, "w", 60.0))
    done = stand.post(announce=False)
    claim = stand.do(lambda work: work.attempts.claim(done, "w", 60.0))
    assert claim is not None
    stand.do(lambda work: work.attempts.succeed(claim, Success({}, {}, {}, f"artifacts/{done}/a1/")))
    kept = [
        f"work/{running}/a1/out/x",
        f"objects/artifacts/{running}/a1/x",
        f"objects/artifacts/{done}/a1/manifest.json",
        "work/not-ours/x",
        "objects/artifacts/not-ours/x",
    ]
    orphans = [
        f"work/{running}/a0/out/x",
        f"work/{done}/a1/out/x",
        "work/job_00000000000000000000000000/a1/x",
        f"objects/artifacts/{running}/a0/x",
        f"objects/artifacts/{done}/a2/deep/x",
        "objects/artifacts/job_00000000000000000000000000/a1/manifest.json",
    ]
    for path in kept + orphans:
        put(stand, path)

    maintenance.clean()

    files = {path.relative_to(stand.settings.data_dir).as_posix() for path in stand.settings.data_dir.rglob("x")}
    files |= {path.relative_to(stand.settings.data_dir).as_posix() for path in stand.settings.data_dir.rglob("manifest.json")}
    assert files == set(kept)


def test_a_deleted_jobs_files_go_even_if_the_deletion_was_cut_short(stand: Stand, maintenance: Maintenance):
    job_id = stand.post(announce=False)
    claim = stand.do(lambda work: work.attempts.claim(job_id, "w", 60.0))
    assert claim is not None
    prefix = f"artifacts/{job_id}/a1/"
    stand.do(lambda work: work.attempts.succeed(claim, Success({}, {}, {}, prefix)))
    put(stand, f"objects/{prefix}manifest.json")
    stand.do(lambda work: work.jobs.delete("tester", job_id))

    maintenance.clean()

    assert stand.stored(job_id) == []


@pytest.mark.parametrize("unheard", [0, HEARD_AT_MOST + 3])
def test_jobs_that_nobody_hears_of_do_not_flood_the_queue(stand: Stand, maintenance: Maintenance, unheard: int):
    ids = [stand.post(announce=False) for _ in range(HEARD_AT_MOST + 4)]
    for _ in range(unheard):
        stand.announcer.announce("job_of_a_burst", "gpu.cpu")

    def forget_announcements() -> None:
        past = stand.job(ids[0]).created_at - timedelta(days=1)
        with stand.do(lambda work: work.jobs._session.connection()).engine.begin() as connection:
            connection.exec_driver_sql("UPDATE jobs SET announced_at = ?", (past.strftime("%Y-%m-%d %H:%M:%S.%f"),))

    for _ in range(5):
        forget_announcements()
        maintenance.round()

    assert stand.unheard() == max(HEARD_AT_MOST, unheard)


def test_one_round_ends_what_is_overdue_and_announces_what_can_go_on(stand: Stand, maintenance: Maintenance):
    lost = stand.post(announce=False)
    stand.do(lambda work: work.attempts.claim(lost, "w", -1.0))
    waited = stand.post_request({"model": "m/m"}, announce=False, max_queue_s=-1)

    maintenance.round()

    assert (stand.job(lost).status, stand.job(lost).attempt) == (JobStatus.QUEUED, 2)
    assert stand.job(waited).status == JobStatus.EXPIRED
    assert stand.unheard() == 1


def test_a_second_maintenance_takes_over_when_the_first_dies(stand: Stand):
    first = stand.start("worker.maintenance")
    lost = stand.post(announce=False)
    stand.do(lambda work: work.attempts.claim(lost, "w", -1.0))
    stand.wait(lambda: stand.job(lost).attempt == 2, "the first to act")
    second = stand.start("worker.maintenance")

    first.kill()
    first.wait()
    stand.do(lambda work: work.attempts.claim(lost, "w", -1.0))
    stand.wait(lambda: stand.job(lost).attempt == 3, "the second to act")

    second.terminate()
    assert second.wait(30) == 0
