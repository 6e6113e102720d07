"""Jobs through HTTP: created, read, listed, cancelled, deleted; their events and reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jobs.database import reading
from jobs.endings import Cause
from tests.api.conftest import Face
from tests.compression.made_reports import full_report

JOB_FIELDS = {
    "id", "object", "status", "stage", "status_reason", "progress", "request", "resolved", "plan", "result", "attempt",
    "max_attempts", "queue", "labels", "created_at", "queued_at", "started_at", "cancelling_at", "finished_at", "links",
}  # fmt: skip
"""The contract's Job, word for word."""
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def test_a_created_job_is_queued_durable_and_announced(face: Face):
    answer = face.client.post("/v1/jobs", json=face.body(target_memory="20MB", labels={"team": "search"}))
    job = answer.json()

    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["request"]["target_memory"] == 20_000_000
    assert job["request"]["calibration"]["samples"] == 128
    assert job["labels"] == {"team": "search"}
    assert face.announced == [job["id"]]
    with reading(face.service.open_reader) as work:
        assert work.jobs.get("anonymous", job["id"]).spec_hash == job["resolved"]["spec_hash"]


def test_every_field_of_the_contract_is_present_at_every_age(face: Face, tmp_path: Path):
    waiting = face.post_job()
    done = face.post_job()
    face.succeed(done["id"], {"a.txt": b"hello"}, tmp_path / "out")
    done = face.client.get(f"/v1/jobs/{done['id']}").json()

    for job in (waiting, done):
        assert set(job) >= JOB_FIELDS
        assert set(job["progress"]) == {"fraction", "block", "blocks", "message", "eta_at"}
        assert set(job["resolved"]) == {"revision", "code_version", "spec_hash"}
        assert set(job["links"]) == {"self", "events", "report", "artifact", "cancel"}
        assert MOMENT.fullmatch(job["created_at"])
    assert waiting["started_at"] is None
    assert waiting["result"] is None
    assert MOMENT.fullmatch(done["finished_at"])
    assert set(done["result"]) == {
        "bytes_before", "bytes_after", "ratio", "retention", "perplexity_before", "perplexity_after", "divergence",
        "verified", "manifest_sha256",
    }  # fmt: skip
    assert done["progress"]["fraction"] == 1.0


def test_a_queued_job_says_how_many_are_ahead(face: Face):
    first, second = face.post_job(), face.post_job()

    queue = face.client.get(f"/v1/jobs/{second['id']}").json()["queue"]
    waiting_for = "no worker that takes gpu.cpu has been seen"
    assert queue == {"class": first["plan"]["memory_class"], "position": 2, "waiting_for": waiting_for}

    face.claim(first["id"])
    assert face.client.get(f"/v1/jobs/{second['id']}").json()["queue"]["position"] == 1
    assert face.client.get(f"/v1/jobs/{first['id']}").json()["queue"] is None


def test_equal_work_has_an_equal_spec_hash_and_other_work_another(face: Face):
    def spec(**members: Any) -> str:
        return face.post_job(**members)["resolved"]["spec_hash"]

    plain = spec()

    assert spec(labels={"team": "other"}, limits={"max_attempts": 1}) == plain
    assert spec(recipe={"steps": [{"step": "quantize", "group_size": 128}]}) == plain, "128 is what the default resolves to"
    assert spec(recipe={"steps": [{"step": "quantize", "group_size": 64}]}) != plain
    assert spec(calibration={"seed": 1}) != plain


def test_the_tag_holds_until_the_job_changes(face: Face):
    url = f"/v1/jobs/{face.post_job()['id']}"
    tag = face.client.get(url).headers["etag"]

    same = face.client.get(url, headers={"If-None-Match": f'W/"other", {tag}'})
    face.claim(url.rpartition("/")[2])
    changed = face.client.get(url, headers={"If-None-Match": tag})

    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert (changed.status_code, changed.json()["status"]) == (200, "running")


def test_the_tag_changes_with_the_place_in_the_queue(face: Face):
    first, second = face.post_job(), face.post_job()
    url = f"/v1/jobs/{second['id']}"
    tag = face.client.get(url).headers["etag"]

    face.claim(first["id"])

    assert face.client.get(url, headers={"If-None-Match": tag}).status_code == 200


def test_only_an_active_job_says_when_to_ask_again(face: Face):
    url = f"/v1/jobs/{face.post_job()['id']}"

    active = face.client.get(url)
    face.client.post(f"{url}/cancel")
    over = face.client.get(url)

    assert active.headers["retry-after"] == "2"
    assert "retry-after" not in over.headers


def test_pages_neither_lose_nor_repeat_a_job_while_new_ones_come(any_face: Face):
    face = any_face
    ids = [face.post_job()["id"] for _ in range(5)]
    seen: list[str] = []
    url: str | None = "/v1/jobs?limit=2"
    while url is not None:
        answer = face.client.get(url)
        seen += [job["id"] for job in answer.json()["data"]]
        face.post_job()
        link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
        assert (link is not None) == answer.json()["has_more"]
        assert link is None or answer.json()["next_cursor"] in link[1]
        url = link[1] if link else None

    assert seen == ids[::-1]


def test_a_list_is_narrowed_by_status_model_and_label(any_face: Face):
    face = any_face
    plain, labelled, cancelled = face.post_job(), face.post_job(labels={"team": "a b"}), face.post_job()
    face.client.post(f"/v1/jobs/{cancelled['id']}/cancel")

    def listed(**query: Any) -> list[str]:
        return [job["id"] for job in face.client.get("/v1/jobs", params=query).json()["data"]]

    assert listed(status="cancelled") == [cancelled["id"]]
    assert listed(status=["cancelled", "queued"]) == [cancelled["id"], labelled["id"], plain["id"]]
    assert listed(**{"label.team": "a b"}) == [labelled["id"]]
    assert listed(model=face.model) == [cancelled["id"], labelled["id"], plain["id"]]
    assert listed(model="another/model") == []


def test_the_link_to_the_next_page_keeps_the_filters(face: Face):
    for _ in range(2):
        face.post_job(labels={"team": "a b"})
        face.post_job()

    link = face.client.get("/v1/jobs", params={"limit": 1, "label.team": "a b"}).headers["link"]
    page = face.client.get(link[1 : link.index(">")]).json()

    assert [job["labels"] for job in page["data"]] == [{"team": "a b"}]
    assert not page["has_more"]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("limit=0", 422, "validation_failed"),
        ("limit=101", 422, "validation_failed"),
        ("limit=x", 422, "validation_failed"),
        ("status=done", 422, "validation_failed"),
        ("statsu=queued", 422, "validation_failed"),
        ("after=yesterday", 400, "invalid_cursor"),
        ("after=job_short", 400, "invalid_cursor"),
    ],
)
def test_a_list_refuses_what_it_does_not_understand(face: Face, query: str, status: int, code: str):
    answer = face.client.get(f"/v1/jobs?{query}")

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_job_may_not_be_created_with_a_query(face: Face):
    answer = face.client.post("/v1/jobs?dry_run=true", json=face.body())

    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "dry_run")
    assert face.rows()["jobs"] == 0


def test_a_queued_job_is_cancelled_at_once_and_only_once(face: Face):
    url = f"/v1/jobs/{face.post_job()['id']}"

    first, second = face.client.post(f"{url}/cancel"), face.client.post(f"{url}/cancel")

    assert (first.status_code, first.json()["status"]) == (202, "cancelled")
    assert second.status_code == 200
    assert second.json() == face.client.get(url).json() == first.json()


def test_a_running_job_is_asked_to_stop(face: Face):
    job = face.post_job()
    face.claim(job["id"])

    first, second = (face.client.post(job["links"]["cancel"]) for _ in range(2))

    assert [(answer.status_code, answer.json()["status"]) for answer in (first, second)] == [(202, "cancelling")] * 2
    assert MOMENT.fullmatch(first.json()["cancelling_at"])


def test_a_finished_job_is_not_cancelled(face: Face, tmp_path: Path):
    job = face.post_job()
    face.succeed(job["id"], {"a.txt": b"hello"}, tmp_path / "out")

    answer = face.client.post(job["links"]["cancel"])

    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


def test_a_job_is_deleted_only_when_it_is_over_and_then_is_gone_with_its_files(face: Face, tmp_path: Path):
    job = face.post_job()
    url = job["links"]["self"]
    active = face.client.delete(url)
    face.succeed(job["id"], {"a.txt": b"hello"}, tmp_path / "out")
    assert face.service.storage.list() != []

    deleted = face.client.delete(url)

    assert (active.status_code, active.json()["code"], active.json()["retryable"]) == (409, "job_active", True)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert face.service.storage.list() == []
    for path in ("", "/events", "/report", "/artifact", "/artifact/files/a.txt"):
        assert face.client.get(f"{url}{path}").status_code == 404
    assert face.client.delete(url).status_code == 404
    assert face.client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("job_id", ["job_00000000000000000000000000", "job_x", "1", "job_0000000000000000000000000%00"])
def test_an_unknown_job_is_not_found_whatever_is_asked_of_it(face: Face, job_id: str):
    url = f"/v1/jobs/{job_id}"
    answers = [face.client.get(url + path) for path in ("", "/events", "/report", "/artifact", "/artifact/files/x")]
    answers += [face.client.post(f"{url}/cancel"), face.client.post(f"{url}/retry"), face.client.delete(url)]

    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(404, "not_found")}


def test_events_come_in_order_and_in_pages(any_face: Face):
    face = any_face
    job = face.post_job()
    claim = face.claim(job["id"])
    with face.work() as work:
        work.attempts.fail(claim, Cause("disk_full", "no room", retryable=False), backoff_s=0.0)

    whole = face.client.get(job["links"]["events"]).json()
    first = face.client.get(f"{job['links']['events']}?limit=2")
    rest = face.client.get(first.headers["link"].split(">")[0][1:]).json()

    assert [event["seq"] for event in whole["data"]] == [1, 2, 3]
    assert [event["type"] for event in whole["data"]] == ["job.created", "job.started", "job.failed"]
    assert whole["data"][2]["data"]["code"] == "disk_full"
    assert first.json()["next_cursor"] == 2
    assert first.json()["data"] + rest["data"] == whole["data"]
    assert (rest["has_more"], rest["next_cursor"]) == (False, None)


def test_a_page_of_events_is_what_it_is_whatever_happens_meanwhile(any_face: Face):
    job = any_face.post_job()
    any_face.claim(job["id"])
    url = f"{job['links']['events']}?limit=1"

    first = any_face.client.get(url)
    any_face.client.post(job["links"]["cancel"])
    rest = any_face.client.get(first.headers["link"].split(">")[0][1:].replace("limit=1", "limit=9")).json()["data"]

    assert [event["type"] for event in first.json()["data"] + rest] == ["job.created", "job.started", "job.cancelling"]


def test_a_failed_job_says_why(face: Face):
    job = face.post_job()
    claim = face.claim(job["id"])
    with face.work() as work:
        work.attempts.fail(claim, Cause("out_of_host_memory", "the child was killed", retryable=False), backoff_s=0.0)

    failed = face.client.get(job["links"]["self"]).json()

    assert failed["status"] == "failed"
    assert failed["status_reason"] == {"code": "out_of_host_memory", "message": "the child was killed", "retryable": False}


def test_events_after_a_number_that_is_none_are_refused(face: Face):
    events = face.post_job()["links"]["events"]

    assert face.client.get(f"{events}?after=-1").json()["code"] == "invalid_cursor"
    assert face.client.get(f"{events}?after=x").json()["code"] == "invalid_cursor"


def test_a_report_is_there_when_the_job_has_succeeded(face: Face, tmp_path: Path):
    job = face.post_job()
    early = face.client.get(job["links"]["report"])
    face.succeed(job["id"], {"a.txt": b"hello"}, tmp_path / "out")

    assert (early.status_code, early.json()["code"], early.json()["retryable"]) == (409, "report_not_ready", True)
    assert face.client.get(job["links"]["report"]).json() == full_report().model_dump(mode="json")


def test_a_job_that_was_cancelled_will_never_have_a_report(face: Face):
    job = face.post_job()
    face.client.post(job["links"]["cancel"])

    problem = face.client.get(job["links"]["report"]).json()

    assert (problem["code"], problem["retryable"]) == ("report_not_ready", False)
    assert "cancelled" in problem["detail"]


@pytest.mark.parametrize("accept", ["text/html", "text/html;q=0.5, text/plain"])
def test_the_page_of_a_job_without_a_report_is_not_ready_either(face: Face, accept: str):
    answer = face.client.get(face.post_job()["links"]["report"], headers={"Accept": accept})

    assert (answer.status_code, answer.json()["code"]) == (409, "report_not_ready")
