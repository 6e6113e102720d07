"""What an attempt finished, the next one takes: after a kill, a stop, a cancel; and it goes when nobody needs it any more."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from jobs.blocks import StoredFile
from jobs.logs import Fields
from jobs.status import JobStatus
from jobs.storage import open_storage
from tests.worker.stand import FAKE, OWNER, Stand, a_stand
from worker.blocks import BlockKeeper
from worker.leash import Interruption, Leash
from worker.maintenance import Maintenance
from worker.room import Room

PLAN = {"blocks": 8, "block_s": 0.4, "keeps": True}


@pytest.fixture(params=["folder", "bucket"])
def keeping(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand whose store is a folder or a bucket."""
    settings: dict[str, str] = {}
    if request.param == "bucket":
        bucket = request.getfixturevalue("s3").fresh_bucket()
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        settings = {"STORAGE_URL": f"s3://{bucket.name}/things", "S3_ENDPOINT_URL": bucket.endpoint}
    with a_stand(tmp_path, **settings) as stand:
        yield stand


def kept(stand: Stand, job_id: str) -> int:
    """How many of the job's blocks have a row."""
    job = stand.job(job_id)
    if job.fingerprint is None:
        return 0
    return len(stand.do(lambda work: work.blocks.find(OWNER, job.fingerprint or "")))


def resumed(stand: Stand, job_id: str) -> int:
    """How many finished blocks the job's attempts took."""
    return sum(event.data["blocks"] for event in stand.events(job_id, "job.resumed"))


def clean(stand: Stand) -> list[str]:
    """Do what maintenance does every minute, and return what is left of blocks in the store."""
    maintenance = Maintenance(stand.settings)
    maintenance.clean()
    maintenance.engine.dispose()
    return maintenance._storage.list("blocks")  # pyright: ignore[reportPrivateUsage]


def test_a_killed_workers_blocks_are_taken_by_the_next_one_and_go_with_success(keeping: Stand):
    stand = keeping
    stand.start("worker.maintenance")
    worker = stand.start_worker("first")
    job_id = stand.post(**PLAN)
    stand.wait(lambda: kept(stand, job_id) >= 2, "two durable blocks")

    worker.kill()
    worker.wait()
    finished = kept(stand, job_id)
    stand.start_worker("second")
    job = stand.wait_over(job_id)

    assert job.status == JobStatus.SUCCEEDED
    assert finished <= resumed(stand, job_id) < PLAN["blocks"]
    assert job.fruitless == 0  # the lost attempt had made blocks durable, so it does not count
    assert {file["path"] for file in stand.do(lambda work: work.jobs.manifest(OWNER, job_id))["files"]} >= {"block-8.bin"}
    stored = sum((attempt.figures or {}).get("bytes_stored", 0) for attempt in stand.attempts(job_id)[1:])
    made = (PLAN["blocks"] - resumed(stand, job_id)) * 1000
    assert stored == made + len("{}")  # no byte is sent twice: blocks as they are made, then report.json alone
    assert clean(stand) == []
    assert stand.do(lambda work: work.blocks.find(OWNER, job.fingerprint or "")) == {}


def test_a_stopped_worker_leaves_the_block_in_hand_behind(tmp_path: Path):
    with a_stand(tmp_path) as stand:
        worker = stand.start_worker("first")
        job_id = stand.post(**PLAN)
        stand.wait_for_block(job_id)

        worker.terminate()
        assert worker.wait(30) == 0
        done = max(event.data["block"] or 0 for event in stand.events(job_id, "job.progress"))
        finished = kept(stand, job_id)
        stand.start_worker("second")

        assert finished >= done > 0
        assert stand.wait_over(job_id).status == JobStatus.SUCCEEDED
        assert resumed(stand, job_id) == finished
        assert stand.job(job_id).attempt == 1  # being told to stop is nobody's failure


def test_a_retry_goes_on_from_a_cancelled_jobs_blocks_though_the_job_is_deleted(tmp_path: Path):
    with a_stand(tmp_path) as stand:
        stand.start_worker()
        job_id = stand.post(**PLAN)
        stand.wait(lambda: kept(stand, job_id) >= 1, "a durable block")
        stand.do(lambda work: work.jobs.request_cancel(OWNER, job_id))
        assert stand.wait_over(job_id).status == JobStatus.CANCELLED
        assert stand.stored(job_id) == []

        again = stand.do(lambda work: work.jobs.add(work.jobs.again(OWNER, job_id))).job
        stand.do(lambda work: work.jobs.delete(OWNER, job_id))
        clean(stand)
        stand.announcer.announce(again.id, again.memory_class)

        assert stand.wait_over(again.id).status == JobStatus.SUCCEEDED
        assert resumed(stand, again.id) >= 1
        assert stand.job(again.id).retry_of == job_id


def test_a_job_that_changed_between_attempts_starts_over_and_says_so(tmp_path: Path):
    with a_stand(tmp_path) as stand:
        worker = stand.start_worker("first")
        job_id = stand.post(**PLAN)
        stand.wait(lambda: kept(stand, job_id) >= 1, "a durable block")
        worker.terminate()
        worker.wait(30)
        request = stand.job(job_id).request
        request["calibration"]["source"]["inline"] = [json.dumps({**PLAN, "block_s": 0.01})]
        stand.change(job_id, request=request)

        stand.start_worker("second")

        assert stand.wait_over(job_id).status == JobStatus.SUCCEEDED
        assert resumed(stand, job_id) == 0
        assert "started_over" in [event.data["code"] for event in stand.events(job_id, "job.warning")]


def test_a_part_that_comes_after_the_lease_is_not_kept_and_ends_the_attempt(tmp_path: Path):
    with a_stand(tmp_path) as stand:
        job_id = stand.post(announce=False)
        room = Room(stand.settings, "w", FAKE, ("gpu.cpu",))
        claim = stand.do(lambda work: work.attempts.claim(job_id, "w", -1.0, room.classes))
        stand.do(lambda work: work.upkeep.expire_leases())
        assert claim is not None
        shard, leash, sizes = tmp_path / "shard", Leash(float("inf")), list[int]()
        shard.write_bytes(b"late")
        line = {"type": "keep", "fingerprint": "f", "name": "block-00000", "files": {"shard": str(shard)}}

        with BlockKeeper(room, claim, leash, Fields(logging.getLogger(), {}), tmp_path / "parts", sizes.append) as keeper:
            assert keeper.take(line, lambda _: None)
            stand.wait(lambda: leash.reason, "the loss to be noticed")

        assert leash.reason is Interruption.LOST
        assert (keeper.stored, list(stand.parts()), sizes) == ([], [], [])


def test_a_part_whose_row_was_never_written_is_removed_and_the_attempts_other_parts_stay(keeping: Stand, tmp_path: Path):
    stand = keeping
    job_id = stand.post(announce=False)
    fingerprint, file = "f" * 64, tmp_path / "half"
    file.write_bytes(b"half a thought")
    storage = open_storage(stand.settings)
    claim = stand.do(lambda work: work.attempts.claim(job_id, "w", 600.0, ("gpu.cpu",)))
    assert claim is not None
    keys = [f"blocks/{OWNER}/{fingerprint}/{job_id}/a1/block-0000{number}/shard" for number in range(3)]
    for key in keys:
        storage.put_file(key, file)
    row = StoredFile("shard", keys[1], 14, "0" * 64)
    assert stand.do(lambda work: work.blocks.keep(claim, OWNER, fingerprint, "block-00001", [row]))

    assert clean(stand) == keys  # the attempt goes on: rows may follow
    stand.change(job_id, status=JobStatus.CANCELLED, lease_until=None)
    assert clean(stand) == [keys[1]]
