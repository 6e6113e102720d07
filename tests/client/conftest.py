"""A scripted service, and a real one, for whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.client.scripted import Scripted, a_server

if TYPE_CHECKING:
    from tests.worker.stand import Stand


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLIMTRIM_URL", "SLIMTRIM_API_KEY", "SLIMTRIM_API_KEY_FILE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    """A service that answers as the test says."""
    with a_server() as script:
        yield script


@dataclass(frozen=True)
class House:
    """A real service: API, worker process and maintenance. What a job does is written in its calibration text."""

    url: str
    stand: Stand
    model: Path

    def body(self, **plan: Any) -> dict[str, Any]:
        """A request on which the stand-in for the library works as the plan says."""
        return {**self.stand.request(**plan), "model": self.model.as_uri(), "recipe": {"steps": [{"step": "quantize"}]}}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One service for all tests of a file."""
    from tests.api.checkpoints import write_mixtral
    from tests.worker.stand import a_stand
    from tests.worker.test_serve import free_port

    folder, port = tmp_path_factory.mktemp("house"), free_port()
    with a_stand(folder, PORT=port) as stand:
        model = write_mixtral(folder / "models" / "mixtral")
        stand.start("api")
        stand.start("worker.maintenance")
        stand.start_worker()
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, trust_env=False) as client:
            stand.wait(lambda: _is_ready(client), "a ready service")
        yield House(url, stand, model)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
