"""A whole job through a real worker and a real child process, with a stand-in for the library."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.status import JobStatus
from tests.worker.stand import FAKE, OWNER, Stand, a_stand


def test_a_job_runs_and_is_published_with_report_manifest_and_files(stand: Stand):
    stand.start_worker("w1")

    job = stand.wait_over(stand.post(blocks=3, block_s=0.3))

    assert (job.status, job.attempt, job.fence, job.status_reason) == (JobStatus.SUCCEEDED, 1, 1, None)
    assert job.artifact_prefix == f"artifacts/{job.id}/a1/"
    report = stand.do(lambda work: work.jobs.report(OWNER, job.id))
    assert report is not None
    assert (report["versions"], len(report["blocks"]), report["revision"]) == ({"folder": "a1"}, 3, "main")
    manifest = stand.do(lambda work: work.jobs.manifest(OWNER, job.id))
    assert manifest is not None
    stored = stand.settings.objects_folder / job.artifact_prefix
    for file in manifest["files"]:
        data = (stored / file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert {file["path"] for file in manifest["files"]} == {"block-1.bin", "block-2.bin", "block-3.bin", "report.json"}
    assert job.result is not None
    assert job.result["manifest_sha256"] == hashlib.sha256((stored / "manifest.json").read_bytes()).hexdigest()


def test_the_events_tell_the_run_in_order_and_progress_only_grows(stand: Stand):
    stand.start_worker()

    job = stand.wait_over(stand.post(blocks=6, block_s=0.5))

    events = stand.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events if event.type != "job.progress"] == [
        "job.created", "job.started", "job.stage", "job.stage", "job.warning", "job.stage", "job.stage", "job.succeeded",
    ]  # fmt: skip
    stages = [event.data["stage"] for event in events if event.type == "job.stage"]
    assert stages == ["fetching", "studying", "compressing", "uploading"]
    fractions = [event.data["fraction"] for event in events if event.type == "job.progress"]
    assert len(fractions) >= 2
    assert all(before < after for before, after in pairwise(fractions))
    assert all(event.data["eta_at"].endswith("Z") for event in events if event.type == "job.progress")


def test_a_job_that_runs_longer_than_its_lease_keeps_it(tmp_path: Path):
    with a_stand(tmp_path, LEASE_S=3) as stand:
        stand.start("worker.maintenance")
        stand.start_worker()

        job = stand.wait_over(stand.post(blocks=40, block_s=0.15))

        assert (job.status, job.fence) == (JobStatus.SUCCEEDED, 1)
        attempt = stand.attempts(job.id)[0]
        assert attempt.lease_until - attempt.started_at > timedelta(seconds=6)


def test_nothing_is_left_in_scratch_and_the_message_is_gone(stand: Stand):
    stand.start_worker()

    stand.wait_over(stand.post())

    stand.wait(lambda: not list(stand.settings.work_folder.glob("*")), "an empty scratch folder")
    assert stand.unheard() == 0


def test_one_worker_does_several_jobs_and_a_doubled_message_makes_no_second_run(stand: Stand):
    ids = [stand.post(blocks=1) for _ in range(3)]
    for job_id in ids * 3:
        stand.announcer.announce(job_id, "gpu.cpu")
    stand.start_worker()

    for job_id in ids:
        assert stand.wait_over(job_id).status == JobStatus.SUCCEEDED
    stand.wait(lambda: stand.unheard() == 0, "all messages heard")

    assert [len(stand.attempts(job_id)) for job_id in ids] == [1, 1, 1]


def test_a_job_whose_message_was_lost_is_announced_again(stand: Stand):
    stand.start_worker()
    stand.start("worker.maintenance")

    job = stand.wait_over(stand.post(announce=False))

    assert job.status == JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("ending", "code", "part"),
    [
        ("permanent", "broken_checkpoint", "the header lies"),
        ("unforeseen", "internal", "RuntimeError"),
        ("memory", "out_of_host_memory", "memory"),
    ],
)
def test_a_lasting_failure_ends_the_job_with_its_code(stand: Stand, ending: str, code: str, part: str):
    stand.start_worker()

    job = stand.wait_over(stand.post(ending=ending))

    assert job.status == JobStatus.FAILED
    assert job.status_reason is not None
    assert (job.status_reason["code"], job.status_reason["retryable"]) == (code, False)
    assert part in job.status_reason["message"]
    assert "secret detail" not in job.status_reason["message"]
    assert ("secret detail" in stand.logs()) is (ending == "unforeseen")  # the traceback is in the log, and only there
    assert (len(stand.attempts(job.id)), stand.stored(job.id)) == (1, [])


@pytest.mark.parametrize(
    ("ending", "code", "part"),
    [
        ("retryable", "download_failed", "incomplete"),
        ("disk", "disk_full", "No space left"),
        ("segfault", "worker_lost", "SIGSEGV"),
        ("sigkill", "worker_lost", "SIGKILL"),
    ],
)
def test_a_passing_failure_is_tried_again_and_then_given_up(stand: Stand, ending: str, code: str, part: str):
    stand.start_worker()
    stand.start("worker.maintenance")

    job = stand.wait_over(stand.post(blocks=1, ending=ending, max_attempts=2))

    assert job.status == JobStatus.FAILED
    assert job.status_reason is not None
    assert job.status_reason["code"] == "attempts_exhausted"
    attempts = stand.attempts(job.id)
    assert [(row.attempt, row.fence, row.outcome, row.code) for row in attempts] == [
        (1, 1, "failed", code),
        (2, 2, "failed", code),
    ]
    assert all(part in (row.message or "") for row in attempts)
    assert stand.stored(job.id) == []


def test_a_worker_survives_a_poisonous_job(stand: Stand):
    stand.start_worker()
    stand.wait_over(stand.post(ending="segfault", max_attempts=1))

    assert stand.wait_over(stand.post()).status == JobStatus.SUCCEEDED


def test_the_library_sees_no_setting_and_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
    with a_stand(tmp_path, HF_TOKEN="hf_abcdefghijklmnop") as stand:
        stand.start_worker()
        job = stand.wait_over(stand.post(ending="environment"))

    assert job.status_reason is not None
    names = set(json.loads(job.status_reason["message"]))
    assert "PATH" in names
    assert [name for name in names if name.startswith(("SLIMTRIM_", "AWS")) or "TOKEN" in name] == []


def test_a_model_outside_the_roots_is_refused_when_the_job_runs(stand: Stand):
    stand.start_worker()
    (stand.folder / "elsewhere").mkdir()
    request = {"model": f"file://{stand.folder}/elsewhere", "recipe": {"steps": [{"step": "analyze"}]}}

    job = stand.wait_over(stand.post_request(request))

    assert job.status_reason is not None
    assert job.status_reason["code"] == "source_not_allowed"


def test_the_library_is_given_the_commit_that_was_planned_not_the_branch(stand: Stand):
    stand.start_worker()
    inline = {"source": {"inline": ["{}"]}}
    request = {
        "model": f"file://{stand.model}",
        "recipe": {"steps": [{"step": "analyze"}]},
        "calibration": inline,
        "revision": "main",
    }

    job = stand.wait_over(stand.post_request(request, resolved={"revision": "c" * 40}))

    report = stand.do(lambda work: work.jobs.report(OWNER, job.id))
    assert report is not None
    assert report["revision"] == "c" * 40


def test_a_job_that_cannot_fit_on_the_disk_is_not_begun(stand: Stand):
    stand.start_worker()
    request = {"model": f"file://{stand.model}", "recipe": {"steps": [{"step": "analyze"}]}}

    job = stand.wait_over(stand.post_request(request, plan={"bytes_after": 10**18}, max_attempts=1))

    assert stand.attempts(job.id)[0].code == "disk_full"
    assert "1000000000000000000" in (stand.attempts(job.id)[0].message or "")


def test_the_library_plans_with_no_more_memory_than_it_may_use(tmp_path: Path):
    with a_stand(tmp_path, JOB_MEMORY_BYTES=900_000_000) as stand:
        stand.start_worker()
        job = stand.wait_over(stand.post(ending="told"))

    assert job.status_reason is not None
    assert job.status_reason["message"] == "may plan with 900000000"


def test_a_worker_takes_no_job_of_another_class_and_one_that_is_alone_takes_all(stand: Stand):
    large = stand.post_request(stand.request(), memory_class="gpu.80g")
    stand.announcer.announce(large, "gpu.cpu")  # a call that went astray
    small = stand.start_worker("small")
    assert stand.wait_over(stand.post()).status == JobStatus.SUCCEEDED
    stand.wait(lambda: "nothing to claim" in stand.logs(), "the refusal of the large job")
    assert stand.job(large).status == JobStatus.QUEUED
    workers = stand.do(lambda work: work.workers.all())
    small.terminate()
    assert small.wait(30) == 0

    assert [worker.classes for worker in workers] == [("gpu.cpu",)]
    assert stand.do(lambda work: work.workers.all()) == []
    stand.start_worker("alone", FAKE, "--alone")
    assert stand.wait_over(large).status == JobStatus.SUCCEEDED


def test_passwords_of_database_and_broker_show_nowhere(tmp_path: Path):
    with a_stand(tmp_path) as stand:
        for name, scheme in (("DATABASE_URL", "postgresql"), ("BROKER_URL", "redis")):
            stand.environment[f"SLIMTRIM_{name}"] = f"{scheme}://canary_user:canary_word@127.0.0.1:1/0"
        for module in ("worker", "worker.maintenance", "jobs.database", "jobs.serve"):
            assert stand.start(module).wait(60) != 0

        assert "connection failed" in stand.logs() or "Connection refused" in stand.logs()
        assert "canary_word" not in stand.logs()


def test_a_worker_refuses_a_database_without_schema(stand: Stand):
    for path in stand.settings.data_dir.glob("db.sqlite3*"):
        path.unlink()

    worker = stand.start_worker()

    assert worker.wait(30) == 2
    assert "python -m jobs.database" in stand.logs()
