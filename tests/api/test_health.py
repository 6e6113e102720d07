"""Alive means the process answers; ready means that a job can be accepted."""

from __future__ import annotations

import shutil
import threading

import pytest
from sqlalchemy import text

from api.schemas import Check
from jobs.keys import ApiKey, new_key
from tests.api.conftest import Face, OpenFace

HARD = {"database", "storage", "schema", "disk"}


def not_ready(face: Face) -> tuple[set[str], str]:
    answer = face.client.get("/readyz")
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["retryable"]) == (503, "unavailable", True)
    assert int(answer.headers["retry-after"]) > 0
    assert face.client.get("/livez").status_code == 200, "what it depends on does not kill the process"
    return {name for name, check in problem["checks"].items() if not check["ok"]}, problem["detail"]


def test_a_whole_service_is_alive_and_ready(face: Face):
    ready = face.client.get("/readyz")

    assert face.client.get("/livez").json()["status"] == "alive"
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert {name for name, check in ready.json()["checks"].items() if check["required"]} == HARD
    assert all(check["ok"] for check in ready.json()["checks"].values())


def test_a_database_without_the_present_schema_is_not_ready(face: Face):
    with face.service.open_session() as session, session.begin():
        session.execute(text("DELETE FROM alembic_version"))

    failed, detail = not_ready(face)

    assert failed == {"schema"}
    assert "migrate" in detail


def test_a_database_that_is_gone_is_not_ready(face: Face):
    face.service.engine.dispose()
    for path in face.service.settings.data_dir.glob("db.sqlite3*"):
        path.unlink()
    (face.service.settings.data_dir / "db.sqlite3").mkdir()

    assert {"database", "schema"} <= not_ready(face)[0]


def test_a_store_that_is_gone_is_not_ready(face: Face):
    shutil.rmtree(face.service.settings.objects_folder)

    assert not_ready(face)[0] == {"storage"}


def test_a_full_disk_is_not_ready(open_face: OpenFace):
    with open_face(min_free_bytes=2**62) as face:
        failed, detail = not_ready(face)

        assert failed == {"disk"}
        assert str(2**62) in detail


def test_a_silent_broker_is_only_a_warning(face: Face):
    shutil.rmtree(face.service.settings.queue_folder)
    face.service.settings.queue_folder.write_text("no folder")

    ready = face.client.get("/readyz")

    assert ready.status_code == 200
    assert ready.json()["checks"]["broker"]["ok"] is False
    assert ready.json()["checks"]["broker"]["required"] is False


def test_a_broker_that_is_down_fails_no_post(face: Face):
    shutil.rmtree(face.service.settings.queue_folder)
    face.service.settings.queue_folder.write_text("no folder")

    face.service.announcer.announce(face.post_job()["id"], "gpu.cpu")

    assert face.rows()["jobs"] == 1


def test_a_service_that_stops_is_not_ready(face: Face):
    face.service.draining.set()

    answer = face.client.get("/readyz")

    assert (answer.status_code, answer.json()["code"]) == (503, "draining")


def test_readiness_tells_no_stranger_where_things_are(open_face: OpenFace):
    _, entry = new_key("ann")
    with open_face(api_keys=(ApiKey.parse(entry),)) as face:
        shutil.rmtree(face.service.settings.objects_folder)

        assert str(face.service.settings.data_dir) not in face.client.get("/readyz").text


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_health_may_be_asked_with_head(face: Face, path: str):
    assert face.client.head(path).status_code == 200


def test_a_server_that_hangs_delays_readiness_by_no_more_than_its_patience(face: Face, monkeypatch: pytest.MonkeyPatch):
    released = threading.Event()
    monkeypatch.setattr("api.readiness.PATIENCE_S", 0.2)
    threads = threading.active_count()
    asked = dict.fromkeys(("storage", "broker"), lambda: released.wait(60) and Check(ok=True, required=True, detail="at last"))

    first, again = (face.service.readiness.ask(asked) for _ in range(2))  # pyright: ignore

    assert threading.active_count() <= threads + 2, "a check that is late is not begun again"
    released.set()
    assert [(check.ok, check.required) for check in (*first.values(), *again.values())] == [(False, True), (False, False)] * 2


def test_every_check_is_asked_at_the_same_time(face: Face):
    barrier = threading.Barrier(3, timeout=30)
    asked = {name: lambda: Check(ok=barrier.wait() >= 0, required=True, detail="") for name in ("a", "b", "c")}

    assert all(check.ok for check in face.service.readiness.ask(asked).values())
