"""``Prefer: wait``: the answer comes when there is something to say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import api.waiting
from tests.api.conftest import Face


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Released whenever a waiting request has looked at its job."""
    import threading

    semaphore = threading.Semaphore(0)
    see = api.waiting.see

    def noted(*arguments: Any):
        seen = see(*arguments)
        semaphore.release()
        return seen

    monkeypatch.setattr(api.waiting, "see", noted)
    return semaphore


def test_the_answer_comes_when_the_job_ends_before_the_time_is_over(face: Face, looked: Any, tmp_path: Path):
    job = face.post_job()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(face.client.get, job["links"]["self"], headers={"Prefer": "wait=60"})
        assert looked.acquire(timeout=30)
        assert looked.acquire(timeout=30)
        face.succeed(job["id"], {"a.txt": b"hello"}, tmp_path / "out")
        answer = waiting.result(timeout=30)

    assert answer.json()["status"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=60"


def test_a_post_can_wait_for_the_end_of_its_job(face: Face, looked: Any):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(face.client.post, "/v1/jobs", json=face.body(), headers={"Prefer": "wait=60"})
        assert looked.acquire(timeout=30)
        [job_id] = face.announced  # the job is durable and announced while its answer still waits
        face.client.post(f"/v1/jobs/{job_id}/cancel")
        answer = waiting.result(timeout=30)

    assert (answer.status_code, answer.json()["status"]) == (201, "cancelled")


def test_with_a_known_tag_the_answer_comes_at_the_first_change(face: Face, looked: Any):
    job = face.post_job()
    tag = face.client.get(job["links"]["self"]).headers["etag"]
    headers = {"Prefer": "wait=60", "If-None-Match": tag}
    with ThreadPoolExecutor(1) as pool:
        assert looked.acquire(timeout=30)
        assert looked.acquire(timeout=30)
        waiting = pool.submit(face.client.get, job["links"]["self"], headers=headers)
        assert looked.acquire(timeout=30)
        face.claim(job["id"])
        answer = waiting.result(timeout=30)

    assert (answer.status_code, answer.json()["status"]) == (200, "running")


def test_when_nothing_happens_the_answer_is_the_job_as_it_is(face: Face):
    job = face.post_job()

    answer = face.client.get(job["links"]["self"], headers={"Prefer": "respond-async, wait=1"})

    assert answer.json() == job
    assert answer.headers["preference-applied"] == "wait=1"


def test_when_nothing_changed_in_time_the_tag_still_holds(face: Face):
    job = face.post_job()
    tag = face.client.get(job["links"]["self"]).headers["etag"]

    answer = face.client.get(job["links"]["self"], headers={"Prefer": "wait=1", "If-None-Match": tag})

    assert answer.status_code == 304


def test_longer_than_a_minute_is_a_minute_and_an_ended_job_is_not_waited_for(face: Face):
    job = face.post_job()
    face.client.post(job["links"]["cancel"])

    answer = face.client.get(job["links"]["self"], headers={"Prefer": "wait=3600"})

    assert answer.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize("preference", ["wait=soon", "return=minimal", "await=5", "wait=-5"])
def test_a_preference_that_is_not_understood_is_ignored(face: Face, preference: str):
    answer = face.client.get(face.post_job()["links"]["self"], headers={"Prefer": preference})

    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


def test_whoever_waits_is_answered_when_the_service_stops(face: Face, looked: Any):
    job = face.post_job()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(face.client.get, job["links"]["self"], headers={"Prefer": "wait=60"})
        assert looked.acquire(timeout=30)
        face.service.draining.set()

        assert waiting.result(timeout=30).json()["status"] == "queued"
    refused = face.client.post("/v1/jobs", json=face.body())
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) > 0
