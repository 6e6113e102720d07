"""The client as a package of its own: it installs alone, runs on older Pythons, and needs two libraries."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client"
SOURCE = CLIENT / "src" / "slimtrim_client"


def ran(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    ended = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, env=environment or None)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="NOT RUN: the build backend is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: building leaves files beside the source.
    shutil.copytree(CLIENT, folder / "client", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    ran(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        folder / "client",
    )
    [built] = folder.glob("*.whl")
    return built


def test_a_wheel_installs_alone_and_its_command_runs(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", symlinks=True)
    [site] = (tmp_path / "venv/lib").glob("python*/site-packages")
    ran(
        sys.executable,
        "-m",
        "pip",
        "--python",
        tmp_path / "venv/bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )
    theirs = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(map(str, theirs)))  # httpx and rich, as installed here

    told = ran(tmp_path / "venv/bin/slimtrim", "--help", cwd=tmp_path)
    place = ran(tmp_path / "venv/bin/python", "-c", "import slimtrim_client as s; print(s.__file__, s.__version__)", cwd=tmp_path)

    assert "submit" in told
    assert str(site) in place
    assert place.split()[1] in wheel.name
    assert (site / "slimtrim_client/py.typed").is_file()


def test_it_needs_two_libraries_and_nothing_of_the_house():
    modules: set[str] = set()
    for file in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level
                modules.add((node.module or "").split(".")[0])

    assert modules - set(sys.stdlib_module_names) == {"httpx", "rich", "slimtrim_client"}


def older_python() -> str | None:
    for name in ("python3.10", *sorted(map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python")))):
        found = shutil.which(name)
        if found and subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.startswith(
            "Python 3.10"
        ):
            return found
    return None


def test_the_oldest_python_that_is_promised_imports_it():
    python = older_python()
    if python is None:
        pytest.skip("NOT RUN: there is no Python 3.10 here")
    # Pure Python, so what is installed for a newer one will do.
    theirs = [entry for entry in sys.path if entry.endswith("site-packages")]
    script = (
        f"import sys; sys.path[:0] = [{str(SOURCE.parent)!r}]; sys.path += {theirs!r}; "
        "import slimtrim_client.cli; sys.exit(slimtrim_client.cli.main(['--version']))"
    )

    assert "slimtrim-client" in ran(python, "-c", script)
