"""Artifacts in a bucket through HTTP: links that the S3 server itself honours, and not a byte through the service."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from jobs.keys import ApiKey, new_key
from tests.api.conftest import Face, OpenFace
from tests.servers import Bucket

WEIGHTS = random.Random(0).randbytes(2**20 + 17)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "deeper/caf\u00e9 1.txt": b"text", "empty.txt": b""}


@pytest.fixture
def face(open_face: OpenFace, bucket: Bucket) -> Iterator[Face]:
    with open_face(**bucket.settings, model_buckets=(bucket.name,)) as opened:
        yield opened


@pytest.fixture
def job(face: Face, tmp_path: Path) -> dict[str, Any]:
    made = face.post_job()
    face.succeed(made["id"], FILES, tmp_path / "out")
    return made


def test_every_link_of_the_manifest_gives_the_bytes_that_it_says(face: Face, job: dict[str, Any], bucket: Bucket):
    artifact = face.client.get(job["links"]["artifact"]).json()

    assert {file["path"] for file in artifact["files"]} == set(FILES)
    for file in artifact["files"]:
        answer = httpx.get(file["url"])
        assert answer.content == FILES[file["path"]]
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert answer.headers["content-type"] == file["media_type"]
        assert answer.headers["content-disposition"].startswith("attachment")
        assert int(parse_qs(urlsplit(file["url"]).query)["X-Amz-Expires"][0]) <= 15 * 60
        assert bucket.secret_key not in file["url"]


def test_a_files_own_address_leads_to_the_bucket(face: Face, job: dict[str, Any]):
    url = f"{job['links']['artifact']}/files/model.safetensors"

    answer = face.client.get(url, follow_redirects=False)

    assert (answer.status_code, answer.content) == (307, b"")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(answer.headers["location"]).content == WEIGHTS


def test_ranges_and_conditions_are_honoured_behind_the_redirect(face: Face, job: dict[str, Any]):
    url = f"{job['links']['artifact']}/files/model.safetensors"
    place = face.client.get(url, follow_redirects=False).headers["location"]
    tag = httpx.get(place, headers={"Range": "bytes=0-0"}).headers["etag"]

    part = httpx.get(place, headers={"Range": "bytes=100-199", "If-Match": tag})
    other = httpx.get(place, headers={"Range": "bytes=100-199", "If-Match": '"0"'})

    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert other.status_code == 412


def test_head_leads_to_an_address_that_takes_head(face: Face, job: dict[str, Any]):
    answer = face.client.head(f"{job['links']['artifact']}/files/model.safetensors", follow_redirects=False)

    assert answer.status_code == 307
    assert httpx.head(answer.headers["location"]).headers["content-length"] == str(len(WEIGHTS))
    assert httpx.get(answer.headers["location"]).status_code == 403


@pytest.mark.parametrize("path", ["nothing.txt", "manifest.json", "..%2Fa1%2Fconfig.json", ""])
def test_what_the_manifest_does_not_list_gets_no_link(face: Face, job: dict[str, Any], path: str):
    answer = face.client.get(f"{job['links']['artifact']}/files/{path}", follow_redirects=False)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_only_the_jobs_owner_gets_a_link(open_face: OpenFace, bucket: Bucket, tmp_path: Path):
    (ann, one), (bob, other) = new_key("ann"), new_key("bob")
    keys = (ApiKey.parse(one), ApiKey.parse(other))
    with open_face(**bucket.settings, api_keys=keys) as face:
        face.client.headers["Authorization"] = f"Bearer {ann}"
        job = face.post_job()
        face.succeed(job["id"], FILES, tmp_path / "out")
        url = f"{job['links']['artifact']}/files/config.json"
        answers = [
            face.client.get(url, headers={"Authorization": f"Bearer {key}"}, follow_redirects=False) for key in (ann, bob, "x")
        ]

    assert [answer.status_code for answer in answers] == [307, 404, 401]


def test_deleting_a_job_takes_its_artifact_out_of_the_bucket(face: Face, job: dict[str, Any]):
    url = face.client.get(job["links"]["artifact"]).json()["files"][0]["url"]

    assert face.client.delete(job["links"]["self"]).status_code == 204

    assert httpx.get(url).status_code == 404
    assert face.service.storage.list() == []


def test_the_service_is_ready_as_long_as_the_bucket_answers(face: Face):
    assert face.client.get("/readyz").status_code == 200
    assert face.service.storage.list() == []


def test_a_bucket_that_does_not_answer_makes_the_service_not_ready(open_face: OpenFace, bucket: Bucket):
    with open_face(**{**bucket.settings, "s3_endpoint_url": "http://127.0.0.1:1"}) as face:
        answer = face.client.get("/readyz")

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "SLIMTRIM_S3_ENDPOINT_URL" in answer.json()["detail"]


def test_a_model_in_a_bucket_becomes_a_job_that_is_pinned_to_it(face: Face, bucket: Bucket):
    client = bucket.client()
    for path in Path(face.model.removeprefix("file://")).iterdir():
        client.put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/model/{path.name}", Body=path.read_bytes())
    url = f"s3://{bucket.name}/{bucket.prefix}/model"

    job = face.post_job(model=url)
    again = face.post_job(model=url)
    changed = b" " + (Path(face.model.removeprefix("file://")) / "config.json").read_bytes()
    client.put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/model/config.json", Body=changed)
    other = face.post_job(model=url)

    revisions = [made["resolved"]["revision"] for made in (job, again, other)]
    assert len(revisions[0]) == 64
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize(
    ("members", "code", "pointer"),
    [
        ({"model": "s3://other-bucket/model"}, "source_not_allowed", "/model"),
        ({"model": "s3://{bucket}-evil/model"}, "source_not_allowed", "/model"),
        ({"model": "s3://{bucket}/../other/model"}, "source_not_allowed", "/model"),
        ({"model": "s3://{bucket}/nothing"}, "model_not_found", "/model"),
        ({"calibration": {"source": "s3://other-bucket/a.txt"}}, "source_not_allowed", "/calibration/source"),
        ({"calibration": {"source": "s3://{bucket}/nothing.txt"}}, "validation_failed", "/calibration/source"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_is_refused_and_pointed_at(
    face: Face, bucket: Bucket, members: dict[str, Any], code: str, pointer: str
):
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(member) for name, member in value.items()}
        return value.replace("{bucket}", bucket.name)

    answer = face.client.post("/v1/jobs", json=face.body(**filled(members)))

    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
