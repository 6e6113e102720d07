"""A report over HTTP: as JSON or as a page, whichever the caller accepts more."""

from __future__ import annotations

import pytest

from jobs.attempts import Success
from tests.api.conftest import Face
from tests.compression.made_reports import full_report

HTML = {"Accept": "text/html"}


def finished(face: Face) -> str:
    job = face.post_job(webhook={"url": "https://told.example/hook", "events": ["job.succeeded"]})
    report = full_report(name="owner/<b>name")
    claim = face.claim(job["id"])
    success = Success(
        {**report.result(), "manifest_sha256": "0" * 64},
        report.model_dump(mode="json"),
        {"files": [], "bytes": 0},
        "artifacts/a/",
    )
    with face.work() as work:
        assert work.attempts.succeed(claim, success)
    return job["links"]["report"]


def test_a_report_is_a_page_for_who_prefers_one_and_data_for_everyone_else(any_face: Face):
    url, client = finished(any_face), any_face.client

    page, data = client.get(url, headers=HTML), client.get(url)

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "owner/&lt;b&gt;name" in page.text
    assert "told.example" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert (data.headers["content-type"], data.json()) == (
        "application/json",
        full_report(name="owner/<b>name").model_dump(mode="json"),
    )


@pytest.mark.parametrize("headers", [HTML, {}])
def test_a_report_that_the_caller_has_is_not_sent_again(face: Face, headers: dict[str, str]):
    url = finished(face)
    first = face.client.get(url, headers=headers)

    again = face.client.get(url, headers={**headers, "If-None-Match": first.headers["etag"]})

    assert (again.status_code, again.content, again.headers["vary"]) == (304, b"", "Accept")


def test_the_two_forms_have_tags_of_their_own_and_a_third_form_is_refused(face: Face):
    url = finished(face)

    tags = {face.client.get(url, headers=headers).headers["etag"] for headers in (HTML, {})}

    assert len(tags) == 2
    assert face.client.get(url, headers={"Accept": "text/plain"}).json()["code"] == "not_acceptable"


def test_the_contract_says_what_a_report_holds(face: Face):
    document = face.client.get("/openapi.json").json()

    content = document["paths"]["/v1/jobs/{job_id}/report"]["get"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Report"}
    assert content["text/html"]["schema"] == {"type": "string"}
    assert "Bytes before over bytes after" in document["components"]["schemas"]["Report"]["properties"]["ratio"]["description"]
