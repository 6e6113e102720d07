"""A service with a model and with jobs in every state, for requests that should sometimes succeed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from api.app import create_app
from jobs.database import migrate
from jobs.settings import Settings
from tests.api.checkpoints import write_mixtral
from tests.api.conftest import LOOPBACK, Face
from tests.faults.fuzz_contract import World


@contextmanager
def a_face(folder: Path) -> Generator[tuple[TestClient, World]]:
    """Give a client of a fresh service, and what exists there."""
    model = write_mixtral(folder / "models" / "mixtral")
    settings = Settings(data_dir=folder / "data", model_roots=(folder / "models",))
    migrate(settings)
    announced: list[str] = []
    app = create_app(settings, lambda job_id, _: announced.append(job_id))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, follow_redirects=False) as client:
        face = Face(client, app.state.service, f"file://{model}", folder / "models", announced)
        yield client, World(face.model, {"job_id": _jobs(face, folder), "path": ("config.json", "a/b.safetensors", "../x")})


def _jobs(face: Face, folder: Path) -> tuple[str, ...]:
    """Make a finished, a cancelled, a running and a waiting job; return their ids."""
    finished, cancelled, running, waiting = (face.post_job()["id"] for _ in range(4))
    face.succeed(finished, {"config.json": b"{}", "a/b.safetensors": b"12345"}, folder / "artifact")
    face.client.post(f"/v1/jobs/{cancelled}/cancel")
    face.claim(running)
    return finished, cancelled, running, waiting
