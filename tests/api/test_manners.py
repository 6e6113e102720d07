"""What holds for every request: ids, headers, problems for everything, and no crash that tells."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

import api.routes.jobs
from api.errors import CODES
from jobs.errors import StorageUnavailable
from tests.api.conftest import Face

PROBLEM_FIELDS = {"type", "title", "status", "detail", "instance", "code", "retryable"}


def test_an_unknown_path_is_a_problem_too(face: Face):
    for path in ("/nothing", "/v1", "/v1/jobs/", "/v2/jobs", "/docs", "/redoc", "/v1/jobs/x/y/z"):
        answer = face.client.get(path)

        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(answer.json()) >= PROBLEM_FIELDS


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", {"GET", "HEAD", "POST"}),
        ("DELETE", "/v1/jobs", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/jobs/job_x", {"GET", "HEAD", "DELETE"}),
        ("GET", "/v1/plans", {"POST"}),
        ("OPTIONS", "/v1/steps", {"GET", "HEAD"}),
        ("POST", "/livez", {"GET", "HEAD"}),
        ("POST", "/openapi.json", {"GET", "HEAD"}),
    ],
)
def test_an_unsupported_method_says_which_are_supported(face: Face, method: str, path: str, allowed: set[str]):
    answer = face.client.request(method, path)

    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("accept", ["text/plain", "application/json;q=0", "image/*, text/*;q=0.5"])
def test_an_answer_that_the_caller_does_not_accept_is_not_made(face: Face, accept: str):
    headers = {"Accept": accept}
    answers = [face.client.get("/v1/jobs", headers=headers), face.client.post("/v1/jobs", json=face.body(), headers=headers)]

    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(406, "not_acceptable")}
    assert face.rows()["jobs"] == 0


@pytest.mark.parametrize(
    "accept", ["*/*", "application/*", "application/json", "text/html, */*;q=0.1", "text/html, application/json"]
)
def test_an_answer_that_the_caller_accepts_is_given(face: Face, accept: str):
    assert face.client.get("/v1/jobs", headers={"Accept": accept}).status_code == 200


def test_the_callers_own_request_id_comes_back_if_it_is_harmless(face: Face):
    kept = face.client.get("/nothing", headers={"X-Request-Id": "mine-1_A"})
    replaced = [face.client.get("/livez", headers={"X-Request-Id": bad}) for bad in ("", "a b", "x" * 65, "<script>")]

    assert kept.headers["x-request-id"] == "mine-1_A"
    assert kept.json()["instance"] == "urn:slimtrim:request:mine-1_A"
    assert all(re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]) for answer in replaced)
    assert len({answer.headers["x-request-id"] for answer in replaced}) == len(replaced)


@pytest.mark.parametrize("path", ["/livez", "/nothing", "/v1/jobs", "/v1/steps", "/openapi.json"])
def test_no_answer_is_kept_sniffed_or_told_on(face: Face, path: str):
    headers = face.client.get(path).headers

    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-request-id"]


def test_head_is_get_without_the_body(face: Face):
    url = face.post_job()["links"]["self"]
    get, head = face.client.get(url), face.client.head(url)

    assert head.content == b""
    assert head.status_code == get.status_code
    assert (head.headers["etag"], head.headers["content-length"]) == (get.headers["etag"], get.headers["content-length"])


def test_a_stated_length_that_is_too_much_is_refused_before_anything_is_read(face: Face):
    answer = face.client.post("/v1/jobs/job_x/cancel", headers={"Content-Length": str(10**12)}, content=b"")

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_crash_is_answered_without_its_cause(face: Face, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def crash(*_: Any) -> None:
        raise RuntimeError("the secret is 42")

    face.post_job()
    monkeypatch.setattr(api.routes.jobs, "job_views", crash)
    answer = face.client.get("/v1/jobs", headers={"X-Request-Id": "the-crash"})

    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (500, "internal", False)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "the-crash"
    assert "42" not in answer.text
    assert "Traceback" not in answer.text
    [record] = [record for record in caplog.records if record.message == "request failed"]
    assert record.exc_info
    assert "the secret is 42" in str(record.exc_info[1])
    assert record.__dict__["request_id"] == "the-crash"


@pytest.mark.parametrize("error", [OperationalError("SELECT", {}, Exception("locked")), StorageUnavailable("mount is gone")])
def test_what_may_pass_is_unavailable_and_says_when_to_come_back(face: Face, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: Any) -> None:
        raise error

    face.post_job()
    monkeypatch.setattr(api.routes.jobs, "job_views", fail)
    answer = face.client.get("/v1/jobs")

    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "unavailable", True)
    assert int(answer.headers["retry-after"]) > 0
    assert "mount" not in answer.text


def test_every_request_is_logged_with_its_id_and_without_its_query(face: Face, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="slimtrim.api"):
        face.client.get("/nothing?signature=secret", headers={"X-Request-Id": "mine"})
        face.client.get("/livez")

    [record] = [vars(record) for record in caplog.records if record.name == "slimtrim.api"]
    assert {name: record[name] for name in ("request_id", "method", "path", "status")} == {
        "request_id": "mine", "method": "GET", "path": "/nothing", "status": 404
    }  # fmt: skip
    assert "secret" not in str(record)


def test_a_titles_code_is_its_own():
    assert len({code.title for code in CODES.values()}) == len(CODES)
