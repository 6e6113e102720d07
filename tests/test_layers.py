"""Arrows point down, and the light half stays light: by contract, and by looking at what really gets loaded."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("api", "jobs", "worker", "compression")
HEAVY = ("torch", "transformers", "safetensors", "datasets", "numpy")


def loaded_by(*modules: str) -> list[str]:
    """Return which heavy packages a fresh interpreter holds after importing the modules."""
    script = f"import json, sys, {', '.join(modules)}; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def modules_of(package: str) -> list[str]:
    files = (ROOT / package).rglob("*.py")
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return sorted(name for name in names if "__main__" not in name and ".migrations." not in name)


def light_half() -> list[str]:
    """Return the modules of the library that the contract calls torch-free."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [contract] = [contract for contract in contracts if "torch" in contract.get("forbidden_modules", ())]
    return [name for name in contract["source_modules"] if name.startswith("compression.")]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_http_face_loads_no_torch():
    assert loaded_by("api.app") == []


def test_no_module_of_api_and_jobs_and_the_light_half_loads_torch():
    light = light_half()

    assert {"compression.recipe", "compression.plan", "compression.errors", "compression.checkpoint.headers"} <= set(light)
    assert loaded_by(*modules_of("api"), *modules_of("jobs"), *light) == []


def test_the_workers_own_process_loads_no_torch():
    assert loaded_by("worker.app", "worker.tasks", "worker.maintenance") == []


def test_the_import_contracts_hold():
    ended = lint_imports(ROOT)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 kept, 0 broken" in ended.stdout


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("jobs/ids.py", "def hidden() -> None:\n    import torch\n", "jobs.ids -> torch"),
        ("jobs/ids.py", "import compression.pipeline\n", "jobs.ids -> compression.pipeline"),
        ("api/views.py", "import worker.tasks\n", "api.views -> worker.tasks"),
        ("compression/plan.py", "import sqlalchemy\n", "compression.plan -> sqlalchemy"),
        ("compression/plan.py", "import jobs.ids\n", "compression.plan -> jobs.ids"),
    ],
)
def test_a_forbidden_import_breaks_a_contract_and_is_named(tmp_path: Path, file: str, line: str, arrow: str):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}")

    ended = lint_imports(tmp_path)

    assert ended.returncode != 0
    assert arrow in ended.stdout


@pytest.mark.parametrize("package", ["compression", "jobs", "api"])
def test_a_packages_init_imports_nothing(package: str):
    # The contracts do not see what an __init__.py drags in.
    tree = ast.parse((ROOT / package / "__init__.py").read_text())

    assert [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)] == []
