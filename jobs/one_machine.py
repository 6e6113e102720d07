"""Where the parts of the service may be: what is made for one machine must not be shared between several."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import SettingsRefused
from jobs.settings import Settings

_MOUNTS = Path("/proc/self/mounts")
_SHARED = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "lustre", "gpfs", "beegfs",
     "afs", "fuse.sshfs", "fuse.s3fs", "ocfs2", "gfs2"}
)  # fmt: skip
"""Kinds of file systems that several machines see. SQLite's shared memory and our locks hold within one machine."""


def refuse_divided_parts(settings: Settings, mounts: Path = _MOUNTS) -> None:
    """Raise ``SettingsRefused`` where workers of several machines would not see the same rows."""
    if not settings.resolved_database_url.startswith("sqlite:"):
        return
    if settings.broker_url is not None and not settings.broker_url.startswith("filesystem:"):
        raise SettingsRefused(
            "SLIMTRIM_BROKER_URL reaches other machines, and the database is a SQLite file that they cannot share: set "
            "SLIMTRIM_DATABASE_URL to a PostgreSQL database, or unset SLIMTRIM_BROKER_URL to stay on one machine"
        )
    folder = Path(settings.resolved_database_url.removeprefix("sqlite:///")).resolve().parent
    if (kind := _file_system(folder, mounts)) in _SHARED:
        raise SettingsRefused(
            f"the SQLite database would lie in {folder}, a network file system ({kind}), on which it can be damaged: set "
            "SLIMTRIM_DATA_DIR to a folder on a local disk, or SLIMTRIM_DATABASE_URL to a PostgreSQL database"
        )


def _file_system(folder: Path, mounts: Path) -> str | None:
    """Return the kind of file system that holds the folder, as far as the machine tells."""
    if not mounts.exists():
        return None
    kinds = dict[Path, str]()
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        kinds[Path(point.replace("\\040", " "))] = kind
    return next((kinds[place] for place in (folder, *folder.parents) if place in kinds), None)
