"""A service on a real database and a real store, spoken to through HTTP. Only the queue is replaced, by a list."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from api.app import create_app
from api.service import Service
from jobs.attempts import Claim, Success
from jobs.database import UnitOfWork, migrate, reading, unit_of_work
from jobs.settings import Settings
from jobs.storage import manifest_sha256
from jobs.tables import Base, IdempotencyKey, Job, JobEvent
from tests.api.checkpoints import tensor_bytes, write_mixtral
from tests.compression.made_reports import full_report

LOOPBACK = "http://127.0.0.1:8000"


@dataclass
class Face:
    """One running service: its HTTP face, and what stands behind it."""

    client: TestClient
    service: Service
    model: str
    roots: Path
    announced: list[str] = field(default_factory=list)

    def body(self, **members: Any) -> dict[str, Any]:
        """Return a request that would be accepted, with some members replaced or added."""
        return {"model": self.model, "recipe": {"steps": [{"step": "quantize"}]}, **members}

    def post_job(self, **members: Any) -> dict[str, Any]:
        """Create a job and return it."""
        answer = self.client.post("/v1/jobs", json=self.body(**members))
        assert answer.status_code == 201, answer.text
        return answer.json()

    def work(self) -> AbstractContextManager[UnitOfWork]:
        """Return a writing transaction, for what a worker would do."""
        return unit_of_work(self.service.open_session, lambda job_id, _: self.announced.append(job_id))

    def claim(self, job_id: str) -> Claim:
        """Take a job as a worker does."""
        with self.work() as work:
            claim = work.attempts.claim(job_id, "a worker", 60.0)
        assert claim is not None
        return claim

    def succeed(self, job_id: str, files: dict[str, bytes], folder: Path) -> dict[str, Any]:
        """Finish a job as a worker does, with these files as its artifact; return the manifest."""
        claim = self.claim(job_id)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        prefix = f"artifacts/{job_id}/a{claim.fence}/"
        manifest = self.service.storage.put_artifact(prefix, folder)
        result = {
            "bytes_before": tensor_bytes(), "bytes_after": 5, "ratio": 2.0, "retention": 0.9, "perplexity_before": 8.0,
            "perplexity_after": 9.0, "divergence": 0.1, "verified": True, "manifest_sha256": manifest_sha256(manifest),
        }  # fmt: skip
        with self.work() as work:
            assert work.attempts.succeed(claim, Success(result, full_report().model_dump(mode="json"), dict(manifest), prefix))
        return dict(manifest)

    def rows(self) -> dict[str, int]:
        """Return how many rows each table holds that a POST writes to."""
        with reading(self.service.open_reader), self.service.open_reader() as session:
            tables: list[type[Base]] = [Job, JobEvent, IdempotencyKey]
            return {table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


OpenFace = Callable[..., AbstractContextManager[Face]]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the present schema and no row, migrated once and copied for each test."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("empty"))
    migrate(settings)
    return settings.data_dir / "db.sqlite3"


@pytest.fixture
def open_face(tmp_path: Path, empty_database: Path) -> OpenFace:
    """``open_face(api_keys=...)``: a service of its own; keyword arguments are settings."""

    @contextmanager
    def opened(**overrides: Any) -> Iterator[Face]:
        roots = tmp_path / "models"
        model = write_mixtral(roots / "mixtral")
        settings = Settings(**{"data_dir": tmp_path / "data", "model_roots": (roots,), **overrides})
        settings.data_dir.mkdir(exist_ok=True)
        if settings.database_url is None:
            shutil.copy(empty_database, settings.data_dir)
        else:
            migrate(settings)
        announced: list[str] = []
        app = create_app(settings, lambda job_id, _: announced.append(job_id))
        with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
            yield Face(client, app.state.service, f"file://{model}", roots, announced)

    return opened


@pytest.fixture
def face(open_face: OpenFace) -> Iterator[Face]:
    """A service without keys."""
    with open_face() as opened:
        yield opened


class Databases(Mapping[str, str | None]):
    """Kind of database -> the setting that names an empty one; a server starts when it is first asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def __getitem__(self, kind: str) -> str | None:
        return None if kind == "sqlite" else self._request.getfixturevalue("postgres").fresh_url()

    def __iter__(self) -> Iterator[str]:
        return iter(("sqlite", "postgresql"))

    def __len__(self) -> int:
        return 2


@pytest.fixture
def database_of(request: pytest.FixtureRequest) -> Databases:
    """``database_of["postgresql"]``: what to set ``database_url`` to."""
    return Databases(request)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_face(request: pytest.FixtureRequest, open_face: OpenFace, database_of: Databases) -> Iterator[Face]:
    """A service without keys, on either kind of database."""
    with open_face(database_url=database_of[request.param]) as opened:
        yield opened
