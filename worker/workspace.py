"""The scratch folder of one attempt, ``work/<job>/a<fence>`` in the data folder. Removed whatever happens.

No two attempts share a folder, so one that lost its job can spoil nothing of the next.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.errors import DiskFull
from jobs.attempts import Claim
from jobs.settings import Settings
from jobs.storage import FolderStorage, open_storage

_KEPT = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
)  # fmt: skip
"""Variables that the library's process gets. No setting of the service is among them, and no token."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where an attempt keeps its files."""

    folder: Path

    @property
    def model(self) -> Path:
        """For a model that has to be fetched."""
        return self.folder / "model"

    @property
    def texts(self) -> Path:
        """For calibration and evaluation text that has to be fetched."""
        return self.folder / "texts"

    @property
    def out(self) -> Path:
        """For the artifact."""
        return self.folder / "out"

    @property
    def parts(self) -> Path:
        """For finished parts of the run: those that were fetched, and what is made to be kept with one."""
        return self.folder / "parts"

    @property
    def temporary(self) -> Path:
        """For what libraries put aside."""
        return self.folder / "tmp"


@contextmanager
def open_workspace(settings: Settings, claim: Claim) -> Generator[Workspace]:
    """Make the attempt's folder and remove it at the end; raise ``DiskFull`` when the job cannot fit."""
    workspace = Workspace(settings.work_folder / claim.job_id / f"a{claim.fence}")
    for folder in (workspace.model, workspace.out, workspace.parts, workspace.temporary):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _check_free_space(settings, workspace, claim)
        yield workspace
    finally:
        remove(workspace.folder)


def remove(folder: Path) -> None:
    """Remove an attempt's folder, and its job's when that is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def bare_environment(workspace: Workspace) -> dict[str, str]:
    """Return the environment of the process that opens other people's files."""
    kept = {name: value for name in _KEPT if (value := os.environ.get(name)) is not None}
    return {**kept, "TMPDIR": str(workspace.temporary), "HF_HUB_DISABLE_TELEMETRY": "1"}


def _check_free_space(settings: Settings, workspace: Workspace, claim: Claim) -> None:
    """Refuse a job that cannot fit, before anything is fetched.

    On the scratch disk: the source, if it is fetched (texts are not counted, nobody says beforehand how long they are), and
    the artifact. Finished blocks are files of the artifact. A store that is a folder on the same disk gives them second
    names, which take no room; where the disk knows no such names it takes the artifact's bytes twice more, for the blocks
    kept and for the artifact. A folder on another disk needs those there. What is free in a bucket nobody tells.
    """
    plan: dict[str, Any] = claim.plan or {}
    components = plan.get("components", {})
    # The cache and the overhead that the target also bounds are never on disk.
    artifact = plan.get("bytes_after", 0) - components.get("kv_cache", 0) - components.get("overhead", 0)
    is_fetched = not str(claim.request.get("model", "")).startswith("file://")
    needed, stored = artifact + (plan.get("bytes_before", 0) if is_fetched else 0), 2 * artifact
    store = open_storage(settings)
    if isinstance(store, FolderStorage) and not store.links_from(workspace.temporary):
        if _is_on_disk_of(settings.objects_folder, workspace.folder):
            needed += stored
        else:
            _require(store.free_bytes(), stored, settings.min_free_bytes, "in the store")
    _require(shutil.disk_usage(workspace.folder).free, needed, settings.min_free_bytes, "of scratch space")


def _is_on_disk_of(folder: Path, other: Path) -> bool:
    return folder.stat().st_dev == other.stat().st_dev


def _require(free: int, needed: int, kept: int, where: str) -> None:
    if free - needed < kept:
        raise DiskFull(f"the job needs {needed} bytes {where} and {kept} must stay free; there are {free}")
