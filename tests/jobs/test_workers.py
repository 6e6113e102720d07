"""The workers' rows: alive, busy, gone, forgotten; and whose turn it is to keep house."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from jobs.errors import SettingsRefused
from jobs.one_machine import refuse_divided_parts
from jobs.settings import Settings
from jobs.tables import Worker
from jobs.turn import Turn
from jobs.workers import ALIVE_S, REMEMBERED_S, Present
from tests.jobs.conftest import Rows


def say(rows: Rows, name: str, job_id: str | None = None) -> None:
    rows.do(lambda work: work.workers.say(name, ["gpu.16g", "gpu.cpu"], "cpu", job_id))


def age(rows: Rows, seconds: float) -> None:
    with rows.open_session() as session, session.begin():
        for worker in session.scalars(select(Worker)).all():
            earlier = worker.last_seen - timedelta(seconds=seconds)
            session.execute(update(Worker).where(Worker.name == worker.name).values(last_seen=earlier))


def present(rows: Rows) -> list[tuple[bool, bool]]:
    return sorted((worker.is_alive, worker.is_busy) for worker in rows.do(lambda work: work.workers.all()))


def test_a_worker_is_alive_while_it_says_so_and_busy_while_it_has_a_job(rows: Rows):
    say(rows, "idle")
    say(rows, "busy")
    say(rows, "busy", rows.add())

    assert present(rows) == [(True, False), (True, True)]
    worker = rows.do(lambda work: work.workers.all())[0]
    assert isinstance(worker, Present)
    assert worker.classes == ("gpu.16g", "gpu.cpu")
    age(rows, ALIVE_S + 5)
    assert present(rows) == [(False, False), (False, True)]
    say(rows, "busy")
    assert present(rows) == [(False, False), (True, False)]


def test_a_worker_that_leaves_is_gone_and_one_that_fell_silent_is_forgotten_after_a_day(rows: Rows):
    say(rows, "a")
    say(rows, "b")

    rows.do(lambda work: work.workers.leave("a"))
    rows.do(lambda work: work.workers.forget_silent())
    assert present(rows) == [(True, False)]
    age(rows, REMEMBERED_S + 5)
    rows.do(lambda work: work.workers.forget_silent())

    assert present(rows) == []
    say(rows, "b")  # it was only cut off
    assert present(rows) == [(True, False)]


def test_one_has_the_turn_until_it_gives_it_up(rows: Rows, tmp_path: Path):
    first, second = Turn(rows.engine, tmp_path / "lock"), Turn(rows.engine, tmp_path / "lock")

    assert (first.is_ours(), second.is_ours(), first.is_ours()) == (True, False, True)
    first.give_up()
    assert (second.is_ours(), first.is_ours()) == (True, False)
    second.give_up()


def test_a_connection_that_was_cut_has_lost_the_turn(rows: Rows, tmp_path: Path):
    if rows.engine.dialect.name == "sqlite":
        pytest.skip("a file's lock has no connection")
    first, second = Turn(rows.engine, tmp_path / "lock"), Turn(rows.engine, tmp_path / "lock")
    assert first.is_ours()

    with rows.engine.connect() as connection:
        query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE locktype = 'advisory'"
        assert connection.scalar(text(query)) is True
        assert second.is_ours()

    assert (first.is_ours(), second.is_ours()) == (False, True)
    second.give_up()


MOUNTS = "overlay / overlay rw 0 0\nserver:/data /srv/shared nfs4 rw 0 0\n/dev/sda1 /srv/shared/local ext4 rw 0 0\n"


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"data_dir": "/srv/shared/x"}, "network file system"),
        ({"data_dir": "/tmp/x", "database_url": "sqlite:////srv/shared/db.sqlite3"}, "network file system"),
        ({"data_dir": "/tmp/x", "broker_url": "redis://127.0.0.1:1/0"}, "SLIMTRIM_DATABASE_URL"),
        ({"data_dir": "/srv/shared/local/x"}, None),
        ({"data_dir": "/srv/shared/x", "database_url": "postgresql://h/d", "broker_url": "redis://h:1/0"}, None),
    ],
)
def test_one_machines_database_is_not_for_several(settings: dict[str, str], refusal: str | None, tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)

    if refusal is None:
        refuse_divided_parts(Settings(**settings), mounts)
    else:
        with pytest.raises(SettingsRefused, match=refusal):
            refuse_divided_parts(Settings(**settings), mounts)
