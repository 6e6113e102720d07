"""How often one may call, and keys that come and go while the service runs."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from api.callers import FAILURES_PER_MINUTE, REMEMBERED_S, Callers
from api.limits import RateLimiter
from jobs.keys import SCOPES, ApiKey, new_key
from tests.api.conftest import Face, OpenFace


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stop_the_clock(face: Face) -> Clock:
    """Give the service's count of callers a clock that the test moves."""
    clock = Clock()
    fresh = Callers(face.service.settings, face.service.open_reader, clock)
    vars(face.service.callers).update(vars(fresh))
    return clock


def create(
    face: Face, owner: str = "ann", scopes: tuple[str, ...] = SCOPES, days: float | None = None
) -> tuple[dict[str, str], str]:
    with face.work() as work:
        key, row = work.keys.create(owner, scopes, days)
    return {"Authorization": f"Bearer {key}"}, row.id


def test_a_bucket_gives_what_it_holds_and_fills_at_its_rate():
    clock = Clock()
    limiter = RateLimiter(60, clock)

    assert [limiter.take("a").is_granted for _ in range(61)] == [True] * 60 + [False]
    assert limiter.take("b").is_granted, "each name has its own"
    assert limiter.take("a").wait_s == pytest.approx(1.0)
    clock.now += 1.0
    assert [limiter.take("a").is_granted for _ in range(2)] == [True, False]
    clock.now += 3600.0
    assert limiter.take("a").left == 59, "never more than a minute's worth"


def test_names_that_nobody_uses_any_more_are_forgotten():
    clock = Clock()
    limiter = RateLimiter(60, clock)
    for number in range(25_000):
        limiter.take(str(number))
        clock.now += 0.01

    assert len(limiter._buckets) <= 10_000  # pyright: ignore[reportPrivateUsage]


def test_a_caller_who_asks_too_often_is_told_how_long_to_wait(open_face: OpenFace):
    keys = [new_key(name) for name in ("ann", "bob")]
    with open_face(rate_limit=3, api_keys=tuple(ApiKey.parse(entry) for _, entry in keys)) as face:
        clock = stop_the_clock(face)
        ann, bob = ({"Authorization": f"Bearer {key}"} for key, _ in keys)

        answers = [face.client.get("/v1/jobs", headers=ann) for _ in range(4)]

        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["ratelimit"] for answer in answers[:3]] == [
            f'"default";r={left};t={t}' for left, t in ((2, 0), (1, 0), (0, 20))
        ]
        assert answers[0].headers["ratelimit-policy"] == '"default";q=3;w=60'
        assert (answers[3].json()["code"], answers[3].json()["retryable"]) == ("rate_limited", True)
        assert answers[3].headers["retry-after"] == "20"
        assert face.client.get("/v1/jobs", headers=bob).status_code == 200
        assert {face.client.get(probe).status_code for probe in ("/livez", "/readyz") for _ in range(5)} == {200}
        clock.now += 20.0
        assert face.client.get("/v1/jobs", headers=ann).status_code == 200


def test_no_limit_is_none(open_face: OpenFace):
    with open_face(rate_limit=0) as face:
        answers = [face.client.get("/v1/steps") for _ in range(20)]

        assert {answer.status_code for answer in answers} == {200}
        assert "ratelimit" not in answers[0].headers


def test_an_address_that_shows_wrong_keys_is_soon_not_heard_and_good_keys_are(open_face: OpenFace):
    with open_face() as face:
        good, _ = create(face)
        clock = stop_the_clock(face)
        face.service.callers.look()
        assert face.client.get("/v1/jobs", headers=good).status_code == 200

        codes = [
            face.client.get("/v1/jobs", headers={"Authorization": f"Bearer slim_{number}"}).json()["code"]
            for number in range(FAILURES_PER_MINUTE + 2)
        ]
        clock.now += 0.5

        assert codes == ["invalid_api_key"] * FAILURES_PER_MINUTE + ["rate_limited"] * 2
        refused = face.client.get("/v1/jobs")
        assert (refused.json()["code"], refused.headers["retry-after"]) == ("rate_limited", "1")
        assert face.client.get("/v1/jobs", headers=good).status_code == 200


def test_a_key_of_the_database_works_until_it_is_revoked(any_face: Face):
    face = any_face
    ann, key_id = create(face, "ann", ("jobs:read",))
    over, _ = create(face, "ann", days=-1)
    clock = stop_the_clock(face)
    face.service.callers.look()

    assert face.client.get("/v1/jobs", headers=ann).status_code == 200
    assert face.client.post("/v1/jobs", json=face.body(), headers=ann).json()["code"] == "insufficient_scope"
    assert face.client.get("/v1/jobs", headers=over).json()["code"] == "invalid_api_key"
    with face.work() as work:
        work.keys.revoke(key_id)
    clock.now += REMEMBERED_S
    refused = face.client.get("/v1/jobs", headers=ann)
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_api_key")


def test_the_first_key_closes_an_open_service_and_the_last_ones_end_does_not_open_it(face: Face):
    clock = stop_the_clock(face)
    mine = face.post_job()
    ann, key_id = create(face)
    clock.now += REMEMBERED_S

    assert face.client.get("/v1/jobs").json()["code"] == "missing_api_key"
    assert face.client.get("/v1/jobs", headers=ann).json()["data"] == []
    assert face.client.get(mine["links"]["self"], headers=ann).status_code == 404
    assert face.client.get("/v1/jobs", headers={**ann, "Host": "slimtrim.example"}).status_code == 200
    with face.work() as work:
        work.keys.revoke(key_id)
    clock.now += REMEMBERED_S
    assert face.client.get("/v1/jobs").json()["code"] == "missing_api_key"


def test_polling_with_a_key_of_the_database_looks_it_up_once(face: Face):
    ann, _ = create(face)
    clock = stop_the_clock(face)
    face.service.callers.look()
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(face.service.engine, "before_cursor_execute", note)
    for _ in range(10):
        face.client.get("/v1/jobs", headers=ann)
        clock.now += REMEMBERED_S / 20
    event.remove(face.service.engine, "before_cursor_execute", note)

    assert len([statement for statement in statements if "api_keys" in statement]) == 1


def test_every_route_with_a_job_hides_another_callers_and_wants_a_key(open_face: OpenFace):
    with open_face() as face:
        ann, _ = create(face, "ann")
        bob, _ = create(face, "bob")
        face.service.callers.look()
        vars(face.service.callers)["_looked_at"] = float("inf")
        job = face.client.post("/v1/jobs", json=face.body(), headers=ann).json()
        paths = face.client.get("/openapi.json").json()["paths"]
        routes = [(method, path) for path, operations in paths.items() if "{job_id}" in path for method in operations]
        assert len(routes) >= 8

        for method, path in routes:
            url = path.format(job_id=job["id"], path="a")
            for accept in ("*/*", "text/event-stream" if path.endswith("/events") else "*/*"):
                foreign = face.client.request(method, url, headers={**bob, "Accept": accept})
                assert (foreign.status_code, foreign.json()["code"]) == (404, "not_found"), (method, path)
            nobody = face.client.request(method, url)
            assert (nobody.status_code, nobody.json()["code"]) == (401, "missing_api_key"), (method, path)
        assert face.client.get(job["links"]["self"], headers=ann).json()["status"] == "queued"
