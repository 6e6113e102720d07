"""What the images are made from agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.settings import describe_settings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {"api", "maintenance", "migrate", "bucket", "worker", "worker-gpu"}


def names(file: Path) -> set[str]:
    return {line for line in file.read_text().splitlines() if line and not line.startswith("#")}


def test_the_api_image_installs_part_of_what_the_service_uses_and_nothing_that_touches_weights():
    api, every = names(ROOT / "docker" / "requirements-api.txt"), names(ROOT / "requirements.txt")

    assert api < every
    assert not api & {"torch", "transformers", "safetensors", "tokenizers", "compressed-tensors", "datasets"}


@pytest.mark.parametrize("module", ["api.__main__", "worker.maintenance", "jobs.database", "jobs.alive"])
def test_nothing_that_the_api_image_runs_needs_more_than_it_installs(module: str):
    left_out = names(ROOT / "requirements.txt") - names(ROOT / "docker" / "requirements-api.txt")
    packages = sorted(name.replace("-", "_") for name in left_out)
    program = f"import sys, importlib; importlib.import_module({module!r}); print(sorted(set({packages!r}) & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.strip() == "[]"


def test_every_setting_that_the_compose_file_gives_is_one():
    given = {name for service in OURS for name in COMPOSE["services"][service]["environment"] if name.startswith("SLIMTRIM_")}

    assert given
    assert given <= set(describe_settings())


def test_every_variable_of_the_compose_file_is_explained_and_none_holds_a_secret():
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    explained = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "docker" / ".env.example").read_text(), re.MULTILINE))

    assert set(explained) == used
    assert {name for name, value in explained.items() if value} == {"API_ADDRESS", "S3_ADDRESS", "S3_PUBLIC_URL", "MODELS_FOLDER"}


def test_ports_are_those_of_the_api_and_the_store_and_on_this_machine():
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}

    assert set(published) == {"api", "s3"}
    assert all(":-127.0.0.1:" in port for ports in published.values() for port in ports)


def test_images_are_pinned_and_ours_write_nowhere():
    for name, service in COMPOSE["services"].items():
        assert re.search(r":\d+\.\d+", service["image"]), name
        assert service.get("read_only", False) == (name in OURS), name


def test_a_worker_is_given_the_time_it_takes_to_stop():
    grace_s = float(describe_settings()["SLIMTRIM_DRAIN_GRACE_S"][0])

    assert float(COMPOSE["services"]["worker"]["stop_grace_period"].removesuffix("s")) >= grace_s + 10
