"""The migrations and the tables say the same, in both directions, whoever asks and however often."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from jobs.database import alembic_config, make_engine, migrate, migrating, require_current_schema, schema_is_current
from jobs.errors import SchemaOutOfDate
from jobs.settings import Settings
from jobs.tables import Base
from tests.jobs.conftest import OWNER, Rows


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


def test_migrating_again_keeps_the_rows(rows: Rows):
    job_id = rows.add()

    migrate(rows.settings)

    assert rows.job(job_id).status == "queued"


def test_many_may_migrate_at_once(tmp_path: Path):
    settings, errors = Settings(data_dir=tmp_path / "data"), list[Exception]()

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


def test_an_empty_database_is_refused_by_name(tmp_path: Path):
    engine = make_engine(Settings(data_dir=tmp_path))

    with pytest.raises(SchemaOutOfDate, match=r"python -m jobs\.database"):
        require_current_schema(engine)
