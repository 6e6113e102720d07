"""An ended job is tried again as a new one, and a caller's queue has an end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.endings import Cause
from tests.api.conftest import Face, OpenFace


def fail(face: Face, job_id: str) -> None:
    claim = face.claim(job_id)
    with face.work() as work:
        work.attempts.fail(claim, Cause("disk_full", "no room", retryable=False), backoff_s=0.0)


def test_a_failed_job_is_tried_again_as_a_new_one_that_does_the_same(face: Face):
    old = face.post_job(labels={"team": "a"}, limits={"max_attempts": 2})
    fail(face, old["id"])
    before = face.client.get(old["links"]["self"]).json()

    answer = face.client.post(f"{old['links']['self']}/retry")
    new = answer.json()

    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/jobs/{new['id']}")
    assert (new["status"], new["attempt"], new["retry_of"]) == ("queued", 1, old["id"])
    for same in ("request", "resolved", "plan", "labels", "max_attempts"):
        assert new[same] == old[same], same
    assert face.announced[-1] == new["id"]
    assert face.client.get(old["links"]["self"]).json() == before, "the old job never changes"
    assert [job["id"] for job in face.client.get("/v1/jobs?label.team=a").json()["data"]] == [new["id"], old["id"]]


def test_a_cancelled_job_is_tried_again_without_its_model_being_read(face: Face):
    old = face.post_job()
    face.client.post(old["links"]["cancel"])
    (face.roots / "mixtral" / "config.json").unlink()

    assert face.client.post(f"{old['links']['self']}/retry").status_code == 201


def test_a_job_that_runs_or_has_succeeded_is_not_tried_again(face: Face, tmp_path: Path):
    active, done = face.post_job(), face.post_job()
    face.succeed(done["id"], {"a.txt": b"hello"}, tmp_path / "out")

    answers = [face.client.post(f"{job['links']['self']}/retry") for job in (active, done)]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(409, "job_active"), (409, "job_finished")]
    assert face.rows()["jobs"] == 2


def test_the_same_key_tries_again_once(face: Face):
    one, other = face.post_job(), face.post_job()
    for job in (one, other):
        face.client.post(job["links"]["cancel"])

    def retry(job: dict[str, dict[str, str]]):
        return face.client.post(f"{job['links']['self']}/retry", headers={"Idempotency-Key": "k"})

    first, second = retry(one), retry(one)

    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert retry(other).json()["retry_of"] == other["id"], "a key belongs to the path that it came with"


def test_a_retry_can_be_waited_for(face: Face):
    old = face.post_job()
    face.client.post(old["links"]["cancel"])

    answer = face.client.post(f"{old['links']['self']}/retry", headers={"Prefer": "wait=0"})

    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=0")


def test_a_full_queue_takes_no_more_until_there_is_room(open_face: OpenFace):
    with open_face(queue_limit=2) as face:
        first = face.post_job()
        known = face.client.post("/v1/jobs", json=face.body(), headers={"Idempotency-Key": "k"})
        refused = face.client.post("/v1/jobs", json=face.body())
        replayed = face.client.post("/v1/jobs", json=face.body(), headers={"Idempotency-Key": "k"})
        cancelled = face.client.post(first["links"]["cancel"])

        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (429, "queue_full", True)
        assert int(refused.headers["retry-after"]) > 0
        assert (replayed.status_code, replayed.json()["id"]) == (201, known.json()["id"])
        assert cancelled.status_code == 202
        assert face.client.post(f"{first['links']['self']}/retry").status_code == 201
        assert face.client.post(f"{first['links']['self']}/retry").status_code == 429


@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_requests_at_once_do_not_overfill_a_queue(open_face: OpenFace, database_of: dict[str, str | None], on: str):
    with open_face(queue_limit=3, database_url=database_of[on]) as face, ThreadPoolExecutor(8) as pool:
        codes = sorted(pool.map(lambda _: face.client.post("/v1/jobs", json=face.body()).status_code, range(12)))

        assert codes == [201] * 3 + [429] * 9
