"""The examples, run as a reader runs them, against a real service with the real library on a tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import slimtrim_client
from examples.demo.service import Service
from tests.compression.test_pipeline import WORDS

ROOT = Path(__file__).resolve().parents[2]
needs_curl = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "jq"))), reason="NOT RUN: bash, curl or jq is missing here"
)


@dataclass(frozen=True)
class House:
    """A service that runs, a request for it, and what an example is run with."""

    url: str
    request: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run an example to its end."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIMTRIM_")}
        environment |= {"SLIMTRIM_URL": self.url, "PYTHONPATH": str(Path(slimtrim_client.__file__).parents[1])}
        return subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def house(tiny_model_factory, tmp_path_factory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(tiny_model_factory("qwen2_moe", dtype="bfloat16"), folder / "model")
    body: dict[str, Any] = {
        "model": (folder / "model").as_uri(),
        # Half of the experts cost this random model several per cent of its likelihood; other recipes happen to gain.
        "recipe": {"steps": [{"step": "expert_drop", "criterion": "reap", "experts_kept": 4}]},
        "calibration": {"source": {"inline": [WORDS * 20]}, "samples": 8, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
    }
    (folder / "request.json").write_text(json.dumps(body))
    with Service(folder) as service:
        yield House(service.url, folder / "request.json")


def test_the_pipeline_passes_above_the_floor_and_what_it_fetched_is_served(house: House, tmp_path: Path):
    artifact = tmp_path / "artifact"
    passed = pipeline(house, artifact, floor="0.5")
    served = house.run(sys.executable, "examples/serve_with_transformers.py", artifact, "the router", "--tokens", "5")

    assert passed.returncode == 0, passed.stderr
    assert "every sha256 checked" in passed.stdout
    assert served.returncode == 0, served.stderr
    assert "the router" in served.stdout


def test_the_pipeline_fails_the_build_below_the_floor_and_the_same_build_pays_once(house: House, tmp_path: Path):
    passed, failed = pipeline(house, tmp_path / "one", floor="0.5"), pipeline(house, tmp_path / "two", floor="0.99")

    assert (passed.returncode, failed.returncode) == (0, 5), failed.stderr
    assert "the build fails: job" in failed.stderr
    assert "- " in failed.stdout  # what was lost is told all the same
    assert not (tmp_path / "two").exists()
    assert job_of(passed) == job_of(failed)


@needs_curl
def test_the_shell_script_does_one_job_and_checks_what_it_fetched(house: House, tmp_path: Path):
    done = house.run("examples/curl.sh", house.request, tmp_path / "artifact")

    assert done.returncode == 0, done.stderr
    job_id = next(line for line in done.stdout.splitlines() if line.startswith("job_"))
    manifest = httpx.get(f"{house.url}/v1/jobs/{job_id}/artifact", trust_env=False).json()
    there = {
        path.relative_to(tmp_path / "artifact").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "artifact").rglob("*")
        if path.is_file()
    }
    assert there == {file["path"]: file["sha256"] for file in manifest["files"]}
    assert done.stdout.count(": OK") == len(there)


@needs_curl
def test_the_shell_script_shows_why_it_was_refused(house: House, tmp_path: Path):
    (tmp_path / "wrong.json").write_text(json.dumps(json.loads(house.request.read_text()) | {"target_memry": 1}))

    refused = house.run("examples/curl.sh", tmp_path / "wrong.json", tmp_path / "artifact")

    assert refused.returncode != 0
    assert "target_memry" in refused.stdout + refused.stderr


def pipeline(house: House, artifact: Path, floor: str) -> subprocess.CompletedProcess[str]:
    return house.run(sys.executable, "examples/pipeline.py", house.request, artifact, "--floor", floor, "--build", "7")


def job_of(ran: subprocess.CompletedProcess[str]) -> str:
    return next(line.removeprefix("job ") for line in ran.stdout.splitlines() if line.startswith("job job_"))
