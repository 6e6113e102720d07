"""Who waits for what: the queues, and a job's own place in words."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update

from compression.planner.sizes import MEMORY_CLASSES
from jobs.tables import Job, Worker
from tests.api.conftest import Face


def queues(face: Face) -> dict[str, Any]:
    return {queue["class"]: queue for queue in face.client.get("/v1/queues").json()["data"]}


def worker(face: Face, name: str, *classes: str, job_id: str | None = None) -> None:
    with face.work() as work:
        work.workers.say(name, classes, "cpu", job_id)


def waiting_for(face: Face, job_id: str) -> str:
    return face.client.get(f"/v1/jobs/{job_id}").json()["queue"]["waiting_for"]


def test_every_class_is_listed_and_an_empty_one_knows_nothing(face: Face):
    listed = queues(face)

    assert list(listed) == list(MEMORY_CLASSES)
    assert listed["gpu.80g"] == {
        "class": "gpu.80g", "queued": 0, "running": 0, "oldest_wait_s": None, "workers_alive": 0, "workers_busy": 0,
        "run_time_p50_s": None, "run_time_p90_s": None, "eta_s": None,
    }  # fmt: skip


def test_a_queue_counts_jobs_and_workers_and_estimates_when_a_new_job_would_begin(face: Face, tmp_path: Path):
    face.succeed(face.post_job()["id"], {"a": b"a"}, tmp_path / "out")
    running = face.post_job()["id"]
    face.claim(running)
    worker(face, "w", "gpu.16g", "gpu.cpu", job_id=running)
    for _ in range(2):
        face.post_job()

    queue = queues(face)["gpu.cpu"]

    assert (queue["queued"], queue["running"], queue["workers_alive"], queue["workers_busy"]) == (2, 1, 1, 1)
    assert queue["oldest_wait_s"] >= 0
    assert queue["run_time_p50_s"] == queue["run_time_p90_s"] > 0
    assert queue["eta_s"] == 3 * queue["run_time_p50_s"]  # the running one and the two that wait
    assert queues(face)["gpu.16g"]["workers_alive"] == 1
    worker(face, "w2", "gpu.16g")
    assert queues(face)["gpu.16g"]["eta_s"] == 0.0


def test_the_queues_tell_no_ids(face: Face):
    job_id = face.post_job()["id"]

    assert job_id not in face.client.get("/v1/queues").text
    assert face.client.get("/v1/queues?class=x").status_code == 422


def test_a_waiting_job_says_why(face: Face):
    first, second = face.post_job()["id"], face.post_job()["id"]
    assert waiting_for(face, first) == "no worker that takes gpu.cpu has been seen"

    worker(face, "large", "gpu.80g")
    worker(face, "a", "gpu.cpu")
    assert waiting_for(face, first) == "needs gpu.cpu; 1 such worker, free; next in line"
    worker(face, "b", "gpu.cpu", job_id=first)
    assert waiting_for(face, second) == "needs gpu.cpu; 2 such workers, 1 busy; 1 job ahead"
    worker(face, "a", "gpu.cpu", job_id=first)
    assert waiting_for(face, second) == "needs gpu.cpu; 2 such workers, both busy; 1 job ahead"

    with face.service.open_session() as session, session.begin():
        hour_ago = session.get_one(Job, first).created_at - timedelta(hours=1)
        session.execute(update(Worker).values(last_seen=hour_ago))
    listed = {job["id"]: job["queue"]["waiting_for"] for job in face.client.get("/v1/jobs").json()["data"]}
    since = hour_ago.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert listed == dict.fromkeys([first, second], f"no worker that takes gpu.cpu has been seen since {since}")
