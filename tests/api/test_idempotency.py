"""The same request sent twice makes one job."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

import api.submission
from jobs.repository import JobRepository
from jobs.settings import Settings
from tests.api.conftest import Face


@pytest.fixture
def face(any_face: Face) -> Face:
    """Each of these is a promise on either database."""
    return any_face


def post(face: Face, key: str, **members: Any):
    return face.client.post("/v1/jobs", json=face.body(**members), headers={"Idempotency-Key": key})


def test_the_same_key_and_body_give_the_same_job(face: Face):
    first, second = post(face, "k"), post(face, "k")

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert first.headers["location"] == second.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert face.rows() == {"jobs": 1, "job_events": 1, "idempotency_keys": 1}
    assert face.announced == [first.json()["id"]]


def test_a_body_that_spells_the_defaults_out_is_the_same_body(face: Face):
    assert post(face, "k").json()["id"] == post(face, "k", profile="portable", labels={}).json()["id"]


def test_a_quoted_key_is_the_bare_key(face: Face):
    assert post(face, "k").json()["id"] == post(face, '"k"').json()["id"]


def test_the_same_key_with_another_body_is_refused(face: Face):
    post(face, "k")

    answer = post(face, "k", labels={"team": "b"})

    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert face.rows()["jobs"] == 1


def test_another_key_makes_another_job(face: Face):
    assert post(face, "k").json()["id"] != post(face, "l").json()["id"]


@pytest.mark.parametrize("key", ["", " ", "two words", "x" * 256, "caf\u00e9".encode("latin-1")])
def test_a_key_that_is_not_visible_text_is_refused(face: Face, key: str | bytes):
    answer = face.client.post("/v1/jobs", json=face.body(), headers={"Idempotency-Key": key})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_header")
    assert face.rows()["jobs"] == 0


def test_a_replay_does_not_need_the_model_any_more(face: Face):
    first = post(face, "k")
    (face.roots / "mixtral" / "model.safetensors").unlink()

    assert post(face, "k").json()["id"] == first.json()["id"]


def test_a_key_whose_job_was_deleted_makes_no_second_one(face: Face):
    url = post(face, "k").headers["location"]
    face.client.post(f"{url}/cancel")
    face.client.delete(url)

    answer = post(face, "k")

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "Idempotency-Key" in answer.json()["detail"]


def test_a_refused_request_leaves_its_key_free(face: Face):
    refused = post(face, "k", recipe={"steps": [{"step": "expert_drop", "experts_kept": 1}]})

    assert refused.status_code == 422
    assert post(face, "k").status_code == 201


def test_a_request_that_failed_half_way_stored_nothing_and_its_retry_is_a_first_try(face: Face, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk I/O error"))

    with monkeypatch.context() as patch:
        patch.setattr(JobRepository, "_remember", broken)
        answer = post(face, "k")
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "unavailable", "10")
    assert face.rows() == {"jobs": 0, "job_events": 0, "idempotency_keys": 0}
    assert face.announced == []

    retried = post(face, "k")

    assert retried.status_code == 201
    assert "idempotent-replayed" not in retried.headers


def test_while_the_first_request_is_worked_on_the_second_is_told_so(face: Face, monkeypatch: pytest.MonkeyPatch):
    planning, go_on = threading.Event(), threading.Event()
    plan_request = api.submission.plan_request

    def slow(*arguments: Any):
        planning.set()
        assert go_on.wait(30)
        return plan_request(*arguments)

    monkeypatch.setattr(api.submission, "plan_request", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, face, "k")
        assert planning.wait(30)
        second = post(face, "k")
        go_on.set()

    assert (second.status_code, second.json()["code"]) == (409, "idempotency_in_flight")
    assert (second.headers["retry-after"], second.json()["retryable"]) == ("1", True)
    assert first.result().status_code == 201
    assert post(face, "k").json()["id"] == first.result().json()["id"]


def test_of_many_requests_at_once_one_makes_the_job(face: Face):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(face, "k"), range(16)))

    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert face.rows()["jobs"] == 1


def test_two_services_on_one_database_make_one_job(face: Face, monkeypatch: pytest.MonkeyPatch):
    """Their memories of keys in flight are apart; the database decides."""
    other = api.service.open_service(face.service.settings, lambda job_id, _: face.announced.append(job_id))
    plan_request = api.submission.plan_request

    def overtaken(request: Any, settings: Settings):
        monkeypatch.setattr(api.submission, "plan_request", plan_request)
        overtaker = api.submission.submit(other, "anonymous", request, "k")
        assert not overtaker.replayed
        return plan_request(request, settings)

    monkeypatch.setattr(api.submission, "plan_request", overtaken)
    answer = post(face, "k")
    other.close()

    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (201, "true")
    assert face.rows() == {"jobs": 1, "job_events": 1, "idempotency_keys": 1}
    assert face.announced == [answer.json()["id"]]
