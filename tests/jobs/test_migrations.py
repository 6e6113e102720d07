"""The migrations and the tables say the same, in both directions, whoever asks and however often."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

import jobs.database
from jobs.database import alembic_config, make_engine, migrate, migrating, reader_maker, require_current_schema, schema_is_current
from jobs.errors import SchemaOutOfDate
from jobs.settings import Settings
from jobs.tables import Base, Job
from tests.jobs.conftest import OWNER, Rows

MIGRATIONS = Path(jobs.database.__file__).parent / "migrations"


def test_the_migrated_schema_is_that_of_the_tables(rows: Rows):
    with rows.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, Base.metadata)

    assert differences == []


def test_the_status_of_a_row_can_be_nothing_else(rows: Rows):
    rows.add()
    for wrong in ("status = 'lost'", "fruitless = 4", "announced_at = NULL"):
        with pytest.raises(IntegrityError), rows.engine.begin() as connection:
            connection.execute(text(f"UPDATE jobs SET {wrong}"))


def test_down_and_up_again_with_rows_present_leaves_empty_tables(rows: Rows):
    rows.claimed(labels={"a": "b"})

    with migrating(rows.settings) as connection:
        command.downgrade(alembic_config(connection), "base")
    with rows.engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
        assert not schema_is_current(connection)
    migrate(rows.settings)

    assert rows.do(lambda work: work.jobs.list(OWNER)).jobs == []
    rows.claimed()


JOB_OF_OLD = (
    "INSERT INTO jobs (id, owner, model, status, progress, fraction, noted_fraction, request, resolved, labels, spec_hash,"
    " attempt, max_attempts, fence, max_runtime_s, max_queue_s, created_at, queued_at, last_seq, version)"
    " VALUES ('job_1', 'ann', 'm/m', 'queued', '{}', 0, 0, '{}', '{}', '{}', '0', 2, 3, 1, 1, 1, "
    "'2026-11-01 00:00:00', '2026-11-02 00:00:00', 1, 1)"
)
"""A job of the first revision that failed once and waits for its next attempt."""


def test_rows_live_through_every_revision_up_and_down(empty: Settings):
    revisions = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]
    assert revisions[0] == "0001"
    with migrating(empty) as connection:
        command.upgrade(alembic_config(connection), "0001")
        connection.execute(text(JOB_OF_OLD))
        connection.execute(text("INSERT INTO job_labels (job_id, name, value) VALUES ('job_1', 'team', 'search')"))

    for number, revision in enumerate(revisions):
        for steps in ([revision], ["0001", revision]):  # and once more, after the way back
            for step in steps:
                with migrating(empty) as connection:
                    way = command.downgrade if step == "0001" and number else command.upgrade
                    way(alembic_config(connection), step)
                    kept = connection.execute(text("SELECT id, attempt, owner FROM jobs JOIN job_labels ON id = job_id")).all()
                    assert [tuple(row) for row in kept] == [("job_1", 2, "ann")]

    engine = make_engine(empty)
    require_current_schema(engine)
    with reader_maker(engine)() as session:
        job = session.scalars(select(Job)).one()
    assert (job.memory_class, job.fruitless, job.announced_at) == ("gpu.cpu", 1, job.queued_at)
    engine.dispose()


def test_migrating_again_keeps_the_rows(rows: Rows):
    job_id = rows.add()

    migrate(rows.settings)

    assert rows.job(job_id).status == "queued"


def test_many_may_migrate_at_once(empty: Settings):
    settings, errors = empty, list[Exception]()

    def try_it() -> None:
        try:
            migrate(settings)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    require_current_schema(make_engine(settings))


def test_a_migration_waits_for_another_one_however_long_it_takes(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    waiting = threading.Thread(target=migrate, args=(settings,))

    with (tmp_path / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert not (tmp_path / "db.sqlite3").exists()
    waiting.join()

    require_current_schema(make_engine(settings))


def test_an_empty_database_is_refused_by_name(empty: Settings):
    engine = make_engine(empty)

    with pytest.raises(SchemaOutOfDate, match=r"python -m jobs\.database"):
        require_current_schema(engine)
