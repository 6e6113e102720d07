"""What a worker works on: one GPU that no other worker has, or the processor; and which jobs fit there.

torch is not asked, because a worker never loads it: the driver's own program is. ``CUDA_VISIBLE_DEVICES`` narrows the
choice, and an empty one means none. A worker holds its GPU by a lock in the machine's temporary folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from compression.planner.sizes import MEMORY_CLASSES
from jobs.errors import DeviceRefused

CPU = "cpu"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_CONTROL = Path("/dev/nvidiactl")
_ASK = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
_ANSWER_S = 30.0
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    index: str
    uuid: str
    name: str
    bytes: int


def visible_devices() -> list[Device]:
    """Return the machine's GPUs that this process may use, in the order in which it may use them."""
    wanted = os.environ.get(VISIBLE)
    if wanted is not None and wanted.strip() in ("", "-1"):
        return []
    if shutil.which(_ASK[0]) is None:
        if _CONTROL.exists():
            raise DeviceRefused(f"there is an NVIDIA driver but no nvidia-smi to ask for its GPUs; install it, or set {VISIBLE}=")
        return []
    answer = subprocess.run(_ASK, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    if answer.returncode != 0:
        raise DeviceRefused(
            f"nvidia-smi failed ({(answer.stdout + answer.stderr).strip()}); set {VISIBLE}= to work without a GPU"
        )
    found = [_device(line) for line in answer.stdout.splitlines() if line.strip()]
    return found if wanted is None else [_named(name.strip(), found) for name in wanted.split(",")]


def take_device(devices: Sequence[Device], worker: str, held: ExitStack, folder: Path | None = None) -> Device | None:
    """Lock the first GPU that no other worker has until ``held`` is closed; None when the machine has none.

    Raises ``DeviceRefused`` when all are taken.
    """
    takers = list[str]()
    for device in devices:
        path = (folder or Path(tempfile.gettempdir())) / f"slimtrim-gpu-{device.uuid}.lock"
        taker = _lock(path, worker, held)
        if taker is None:
            return device
        takers.append(f"{device.uuid} ({device.name}) by {taker}")
    if takers:
        raise DeviceRefused(f"every visible GPU is taken: {'; '.join(takers)}. Start one worker per GPU")
    return None


def fitting_classes(device: Device | None) -> tuple[str, ...]:
    """Return the memory classes that fit the device, its own first; without one, only what needs none."""
    smallest, *_ = MEMORY_CLASSES
    room = 0 if device is None else device.bytes
    fitting = [name for name, size in MEMORY_CLASSES.items() if size <= room or name == smallest]
    return dearest_first(fitting)


def dearest_first(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes, the one that needs most memory first."""
    return tuple(sorted(classes, key=MEMORY_CLASSES.__getitem__, reverse=True))


def _device(line: str) -> Device:
    index, uuid, name, mebibytes = (part.strip() for part in line.split(","))
    return Device(index, uuid, name, int(mebibytes) * _MIB)


def _named(name: str, found: Sequence[Device]) -> Device:
    """Return the device that a part of the variable names: by number, or by the beginning of its uuid."""
    for device in found:
        if name == device.index or (name.startswith("GPU-") and device.uuid.startswith(name)):
            return device
    known = ", ".join(f"{device.index} or {device.uuid}" for device in found) or "none"
    raise DeviceRefused(f"{VISIBLE} names {name!r}, which is no GPU that nvidia-smi lists; it lists {known}")


def _lock(path: Path, worker: str, held: ExitStack) -> str | None:
    """Lock the file and return None, or return who has it."""
    try:
        handle = path.open("a+")
    except PermissionError:  # the temporary folder keeps one user's files from another
        return "a worker of another user"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        taker = handle.read().strip()
        handle.close()
        return f"worker {taker}"
    handle.truncate(0)
    handle.write(worker)
    handle.flush()
    held.enter_context(handle)
    return None
