"""First the commit, then the announcement, then the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.database import reading
from jobs.errors import JobNotFound
from tests.api.conftest import Face


@pytest.fixture
def face(any_face: Face) -> Face:
    """Each of these is a promise on either database."""
    return any_face


class AtTheAnswer:
    """Between application and server: calls back when the first byte of an answer is about to leave."""

    def __init__(self, app: ASGIApp, look: Callable[[], None]) -> None:
        self._app = app
        self._look = look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noticing(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._look()
            await send(message)

        await self._app(scope, receive, noticing)


def status_of(face: Face, job_id: str) -> str | None:
    """Return what another connection sees of a job; it sees only what is committed."""
    with reading(face.service.open_reader) as work:
        try:
            return work.jobs.get("anonymous", job_id).status
        except JobNotFound:
            return None


@pytest.fixture
def seen(face: Face) -> list[tuple[str, Any]]:
    """What was visible when a job was announced and when its answer left."""
    noted: list[tuple[str, Any]] = []
    jobs: list[str] = []

    def announced(job_id: str, memory_class: str) -> None:
        jobs.append(job_id)
        noted.append(("announced", status_of(face, job_id)))

    def answered() -> None:
        noted.append(("answered", status_of(face, jobs[0]) if jobs else None))

    object.__setattr__(face.service, "announce", announced)
    face.client._transport.app = AtTheAnswer(face.client.app, answered)  # pyright: ignore
    return noted


def test_a_job_is_committed_before_it_is_announced_and_announced_before_it_is_answered(face: Face, seen: list[tuple[str, Any]]):
    face.post_job()

    assert seen == [("announced", "queued"), ("answered", "queued")]


def test_a_cancel_is_committed_before_it_is_answered(face: Face, seen: list[tuple[str, Any]]):
    """With a dependency of the default scope the last entry would read "queued"."""
    url = face.post_job()["links"]["cancel"]

    face.client.post(url)

    assert seen[2:] == [("answered", "cancelled")]


def test_a_job_that_is_refused_is_not_announced(face: Face, seen: list[tuple[str, Any]]):
    face.client.post("/v1/jobs", json=face.body(target_memory=1))

    assert seen == [("answered", None)]


@pytest.mark.parametrize("method", ["create", "cancel", "delete"])
def test_a_commit_that_fails_is_no_success_and_is_not_announced(face: Face, method: str):
    job = face.post_job()
    if method == "delete":
        face.client.post(job["links"]["cancel"])
    before = (face.rows(), status_of(face, job["id"]))
    face.announced.clear()

    def fail(_: Connection) -> None:
        raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    event.listen(face.service.engine, "commit", fail)
    try:
        match method:
            case "create":
                answer = face.client.post("/v1/jobs", json=face.body())
            case "cancel":
                answer = face.client.post(job["links"]["cancel"])
            case _:
                answer = face.client.delete(job["links"]["self"])
    finally:
        event.remove(face.service.engine, "commit", fail)

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert (face.rows(), status_of(face, job["id"])) == before
    assert face.announced == []
