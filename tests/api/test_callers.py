"""Who may do what: keys, scopes, and jobs that are nobody else's business."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.keys import SCOPES, ApiKey, new_key
from tests.api.conftest import Face, OpenFace

JOB = "/v1/jobs/job_00000000000000000000000000"
NEEDS = {
    ("GET", "/v1/jobs"): "jobs:read",
    ("GET", JOB): "jobs:read",
    ("GET", f"{JOB}/events"): "jobs:read",
    ("POST", "/v1/plans"): "jobs:read",
    ("GET", "/v1/queues"): "jobs:read",
    ("POST", "/v1/jobs"): "jobs:write",
    ("POST", f"{JOB}/cancel"): "jobs:write",
    ("POST", f"{JOB}/retry"): "jobs:write",
    ("DELETE", JOB): "jobs:delete",
    ("GET", f"{JOB}/report"): "reports:read",
    ("GET", "/v1/reports"): "reports:read",
    ("GET", f"{JOB}/artifact"): "artifacts:read",
    ("GET", f"{JOB}/artifact/files/a"): "artifacts:read",
    ("GET", "/metrics"): "metrics:read",
}
ANY_KEY = [("GET", "/v1/steps"), ("GET", "/v1/architectures")]
PUBLIC = ["/livez", "/readyz", "/openapi.json"]


def caller(name: str, *scopes: str) -> tuple[dict[str, str], ApiKey]:
    """Return the header that a caller sends, and what the service keeps of its key."""
    key, entry = new_key(name, scopes or SCOPES)
    return {"Authorization": f"Bearer {key}"}, ApiKey.parse(entry)


def test_every_route_of_version_1_needs_a_key(open_face: OpenFace):
    _, key = caller("ann")
    with open_face(api_keys=(key,)) as face:
        paths = face.client.get("/openapi.json").json()["paths"]
        published = {
            (method.upper(), path.format(job_id="job_00000000000000000000000000", path="a"))
            for path, operations in paths.items()
            if path.startswith(("/v1", "/metrics"))
            for method in operations
        }
        assert published == set(NEEDS) | set(ANY_KEY)
        for method, path in published:
            answer = face.client.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (401, "missing_api_key"), path
            assert answer.headers["www-authenticate"].startswith("Bearer")
            wrong = face.client.request(method, path, headers={"Authorization": "Bearer slim_wrong"})
            assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_api_key"), path


def test_health_and_the_contract_need_no_key(open_face: OpenFace):
    _, key = caller("ann")
    with open_face(api_keys=(key,)) as face:
        assert [face.client.get(path).status_code for path in PUBLIC] == [200, 200, 200]


def test_a_route_is_open_to_its_scope_alone(open_face: OpenFace):
    callers = {scope: caller(scope.replace(":", "-"), scope) for scope in SCOPES}
    with open_face(api_keys=tuple(key for _, key in callers.values())) as face:
        for (method, path), needed in NEEDS.items():
            for scope, (headers, _) in callers.items():
                answer = face.client.request(method, path, headers=headers)
                assert ('"insufficient_scope"' in answer.text) == (scope != needed), (method, path, scope)
                assert answer.status_code != 403 or needed in answer.json()["detail"]


def test_a_wrong_key_is_told_before_a_wrong_body(open_face: OpenFace):
    headers, key = caller("ann", "jobs:read")
    with open_face(api_keys=(key,)) as face:
        assert face.client.post("/v1/jobs", content=b"{").json()["code"] == "missing_api_key"
        assert face.client.post("/v1/jobs", content=b"{", headers=headers).json()["code"] == "insufficient_scope"


@pytest.mark.parametrize("authorization", ["Bearer", "Bearer ", "Basic dTpw", "slim_x"])
def test_another_kind_of_authorization_is_none(open_face: OpenFace, authorization: str):
    _, key = caller("ann")
    with open_face(api_keys=(key,)) as face:
        answer = face.client.get("/v1/jobs", headers={"Authorization": authorization})

        assert (answer.status_code, answer.json()["code"]) == (401, "missing_api_key")


def test_another_callers_job_does_not_exist(open_face: OpenFace, tmp_path: Path):
    (ann, ann_key), (bob, bob_key) = caller("ann"), caller("bob")
    with open_face(api_keys=(ann_key, bob_key)) as face:
        job = face.client.post("/v1/jobs", json=face.body(), headers=ann).json()
        face.succeed(job["id"], {"a.txt": b"hello"}, tmp_path / "out")
        url = job["links"]["self"]

        for method, path in NEEDS:
            if path.startswith(JOB):
                answer = face.client.request(method, path.replace(JOB, url), headers=bob)
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path)
        assert face.client.get("/v1/jobs", headers=bob).json()["data"] == []
        assert [found["id"] for found in face.client.get("/v1/jobs", headers=ann).json()["data"]] == [job["id"]]
        assert face.client.get(url, headers=ann).json()["status"] == "succeeded"


def test_two_callers_may_use_the_same_idempotency_key(open_face: OpenFace):
    (ann, ann_key), (bob, bob_key) = caller("ann"), caller("bob")
    with open_face(api_keys=(ann_key, bob_key)) as face:
        made = [
            face.client.post("/v1/jobs", json=face.body(), headers={**who, "Idempotency-Key": "k"}) for who in (ann, bob)
        ]  # fmt: skip

        assert [answer.status_code for answer in made] == [201, 201]
        assert made[0].json()["id"] != made[1].json()["id"]


def test_the_key_itself_is_kept_nowhere(open_face: OpenFace, tmp_path: Path):
    headers, key = caller("ann")
    secret = headers["Authorization"].removeprefix("Bearer ")
    with open_face(api_keys=(key,)) as face:
        assert face.client.post("/v1/jobs", json=face.body(), headers=headers).status_code == 201

    assert secret not in repr(key)
    assert all(secret.encode() not in path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", ""])
def test_without_keys_only_this_machines_names_are_served(face: Face, host: str):
    answer = face.client.get("/v1/jobs", headers={"Host": host})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_header")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_without_keys_every_name_of_this_machine_is_served(face: Face, host: str):
    assert face.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_without_keys_no_page_from_elsewhere_may_call(face: Face):
    url = face.post_job()["links"]["cancel"]

    foreign = face.client.post(url, headers={"Origin": "https://evil.example"})
    own = face.client.post(url, headers={"Origin": "http://localhost:8000"})

    assert (foreign.status_code, foreign.json()["code"]) == (400, "invalid_header")
    assert own.status_code == 202


def test_with_keys_any_name_is_served(open_face: OpenFace):
    headers, key = caller("ann")
    with open_face(api_keys=(key,)) as face:
        assert face.client.get("/v1/jobs", headers={**headers, "Host": "slimtrim.example"}).status_code == 200
