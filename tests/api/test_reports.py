"""Finished reports side by side: filters, orders, and pages that jobs finishing meanwhile do not disturb."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from jobs.attempts import Success
from jobs.keys import new_key
from tests.api.conftest import Face, OpenFace


def finish(face: Face, bytes_after: int = 100, retention: float | None = 0.9, **members: Any) -> str:
    job_id = face.post_job(**members)["id"]
    claim = face.claim(job_id)
    result = {
        "bytes_before": 1000, "bytes_after": bytes_after, "ratio": 1000 / bytes_after, "retention": retention,
        "perplexity_before": 8.0, "perplexity_after": 9.0, "divergence": 0.1, "verified": True, "manifest_sha256": "0" * 64,
    }  # fmt: skip
    with face.work() as work:
        assert work.attempts.succeed(claim, Success(result, {}, {"files": [], "bytes": 0}, f"artifacts/{job_id}/a1/"))
    return job_id


def listed(face: Face, **query: Any) -> list[str]:
    answer = face.client.get("/v1/reports", params=query)
    assert answer.status_code == 200, answer.text
    return [report["id"] for report in answer.json()["data"]]


def test_a_report_shows_what_came_out_and_where_the_rest_is(face: Face):
    face.post_job()
    job_id = finish(face, 250, labels={"team": "a"})

    [report] = face.client.get("/v1/reports").json()["data"]

    assert (report["id"], report["object"], report["model"], report["profile"]) == (job_id, "report", face.model, "portable")
    assert (report["bytes_before"], report["bytes_after"], report["ratio"], report["retention"]) == (1000, 250, 4.0, 0.9)
    assert (report["perplexity_before"], report["perplexity_after"], report["divergence"]) == (8.0, 9.0, 0.1)
    assert (report["target_memory"], report["labels"]) == (None, {"team": "a"})
    assert report["recipe"]["steps"][0]["step"] == "quantize"
    assert report["finished_at"].endswith("Z")
    for link in report["links"].values():
        assert face.client.get(link).status_code == 200


def test_reports_are_narrowed_and_ordered(any_face: Face):
    face = any_face
    small, unmeasured, best = finish(face, 100, 0.5), finish(face, 50, None), finish(face, 300, 1.01)

    assert listed(face) == listed(face, order="newest") == [best, unmeasured, small]
    assert listed(face, order="bytes") == [unmeasured, small, best]
    assert listed(face, order="retention") == [best, small, unmeasured], "what was not measured comes last"
    assert listed(face, max_bytes=100) == [unmeasured, small]
    assert listed(face, min_retention=0.5) == [best, small]
    assert listed(face, model=face.model, max_bytes=100, min_retention=0.1) == [small]
    assert listed(face, model="another/model") == []


@pytest.mark.parametrize("order", ["newest", "bytes", "retention"])
def test_pages_neither_lose_nor_repeat_a_report_while_jobs_finish(any_face: Face, order: str):
    face = any_face
    ids = [finish(face, 100 + number % 2, (0.5, None, 0.7)[number % 3]) for number in range(6)]
    whole = listed(face, order=order)
    seen: list[str] = []
    url: str | None = f"/v1/reports?order={order}&limit=2"
    while url is not None:
        answer = face.client.get(url)
        seen += [report["id"] for report in answer.json()["data"]]
        finish(face, 100, 0.5)
        link = answer.headers.get("link")
        assert (link is not None) == answer.json()["has_more"] == (answer.json()["next_cursor"] is not None)
        url = None if link is None else link[1 : link.index(">")]

    assert [job_id for job_id in seen if job_id in ids] == whole
    assert len(seen) == len(set(seen))


def cursor(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


JOB = "job_00000000000000000000000000"


@pytest.mark.parametrize(
    "after",
    [
        "x", "%00", "!!!!", "e30", cursor(), cursor("bytes", 1, JOB), cursor("newest", 1, JOB), cursor("newest", "2026", "x"),
        cursor("newest", "2026-01-01T00:00:00", JOB), cursor("newest", None, JOB), "A" * 4000,
        cursor("newest", "2026-01-01", [JOB]),
    ],
)  # fmt: skip
def test_a_cursor_that_was_not_given_is_refused(face: Face, after: str):
    answer = face.client.get("/v1/reports", params={"after": after})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


@pytest.mark.parametrize("after", [cursor("bytes", True, JOB), cursor("bytes", "1", JOB), cursor("bytes", 1e300, JOB)])
def test_a_cursor_with_a_value_that_is_none_is_refused(face: Face, after: str):
    assert face.client.get("/v1/reports", params={"order": "bytes", "after": after}).json()["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    "query", ["order=best", "limit=0", "max_bytes=-1", "min_retention=x", "min_retention=nan", "ordre=bytes"]
)
def test_a_question_that_is_not_understood_is_refused(face: Face, query: str):
    answer = face.client.get(f"/v1/reports?{query}")

    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")


def test_reports_are_their_owners_and_end_with_their_job(open_face: OpenFace):
    from jobs.keys import ApiKey

    keys = [new_key(name) for name in ("ann", "bob")]
    with open_face(api_keys=tuple(ApiKey.parse(entry) for _, entry in keys)) as face:
        ann, bob = ({"Authorization": f"Bearer {key}"} for key, _ in keys)
        face.client.headers.update(ann)
        job_id = finish(face)

        assert listed(face) == [job_id]
        assert face.client.get("/v1/reports", headers=bob).json()["data"] == []
        assert face.client.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert listed(face) == []
