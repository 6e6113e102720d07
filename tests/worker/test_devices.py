"""Which GPU a worker gets, and which jobs with it. The driver's program is played by a script of the same name."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.errors import DeviceRefused
from worker.devices import Device, dearest_first, fitting_classes, take_device, visible_devices

GPUS = "0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bbbb-2, Tesla T4, 15360\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds nvidia-smi and nothing else of the search path."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nprintf "{GPUS}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aaaa-1", "GPU-bbbb-2"]),
        ("", []),
        ("-1", []),
        ("1", ["GPU-bbbb-2"]),
        ("1,0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        ("GPU-aaaa", ["GPU-aaaa-1"]),
    ],
)
def test_the_variable_narrows_the_choice(machine: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, uuids: list[str]):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert [device.uuid for device in visible_devices()] == uuids


def test_what_cannot_be_found_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(DeviceRefused, match=r"'7'.*0 or GPU-aaaa-1"):
        visible_devices()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine.write_text("#!/bin/sh\necho driver mismatch; exit 9\n")
    with pytest.raises(DeviceRefused, match="driver mismatch"):
        visible_devices()


def test_two_workers_never_share_a_gpu(machine: Path, tmp_path: Path):
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        taken = [take_device(visible_devices(), name, held, tmp_path) for name, held in (("ann", first), ("bob", second))]
        assert [device and device.uuid for device in taken] == ["GPU-aaaa-1", "GPU-bbbb-2"]
        with pytest.raises(DeviceRefused, match=r"GPU-aaaa-1 .* by worker ann; GPU-bbbb-2 .* by worker bob"):
            take_device(visible_devices(), "cid", third, tmp_path)

        first.close()
        assert take_device(visible_devices(), "cid", third, tmp_path) == taken[0]
        assert take_device([], "dan", third, tmp_path) is None


CARDS = {0: "gpu.cpu", 15360: "gpu.16g", 24564: "gpu.24g", 46068: "gpu.48g", 81559: "gpu.80g", 143771: "gpu.141g"}
"""Mebibytes that nvidia-smi tells of cards of these sizes."""


@pytest.mark.parametrize(("mebibytes", "largest"), CARDS.items())
def test_a_gpu_takes_its_own_class_first_and_smaller_ones_after(mebibytes: int, largest: str):
    classes = fitting_classes(Device("0", "u", "n", mebibytes * 2**20))

    assert (classes[0], classes[-1]) == (largest, "gpu.cpu")
    assert classes == dearest_first(classes)
    assert fitting_classes(None) == ("gpu.cpu",)
