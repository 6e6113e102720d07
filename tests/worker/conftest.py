"""A stand, or a database, of its own for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.database import migrate
from jobs.settings import Settings
from tests.jobs.conftest import Rows
from tests.servers import Postgres, Redis
from tests.worker.stand import Stand, a_stand


@pytest.fixture
def production(postgres: Postgres, redis_server: Redis) -> dict[str, str]:
    """Settings of a stand on PostgreSQL and Redis."""
    return {"DATABASE_URL": postgres.fresh_url(), "BROKER_URL": redis_server.fresh_url()}


@pytest.fixture(params=["embedded", "production"])
def parts(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of a stand, in one folder and on production parts."""
    return request.getfixturevalue("production") if request.param == "production" else {}


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with a_stand(tmp_path) as stand:
        yield stand


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    settings = Settings(data_dir=tmp_path / "data")
    migrate(settings)
    rows = Rows(settings)
    yield rows
    rows.engine.dispose()
