"""What is true of the folder alone: disks, links, modes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs.storage.folder
from compression.errors import DiskFull
from jobs.errors import StorageUnavailable
from jobs.storage import MANIFEST, FolderStorage, KnownObject, ObjectNotFound, Storage
from tests.jobs.conftest import FILES, PREFIX


@pytest.fixture
def store(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "store")


def on_disk(tmp_path: Path) -> list[str]:
    root = tmp_path / "store"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_the_stored_bytes_are_those_that_were_hashed_even_on_another_disk(
    store: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    linked = store.put_artifact(PREFIX, folder)

    def another_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", another_disk)
    copied = store.put_artifact("artifacts/job_1/a2", folder)

    assert copied == linked
    assert [store.size(f"artifacts/job_1/a2/{name}") for name in FILES] == [len(content) for content in FILES.values()]


def test_the_manifest_comes_last(store: FolderStorage, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed before the last step, there is no artifact; what is left is found and removed like any other."""
    rename = Path.rename
    renamed: list[str] = []

    def noted(self: Path, target: Path) -> Path:
        renamed.append(target.name)
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    with pytest.raises(KeyboardInterrupt):
        store.put_artifact(PREFIX, folder)

    assert renamed == ["config.json", "empty", "model.safetensors", "merges.txt", MANIFEST]
    assert f"{PREFIX}{MANIFEST}" not in store.list()
    assert store.list() != []
    store.delete(PREFIX)
    assert on_disk(tmp_path) == store.list() == []


def test_a_full_disk_is_named_and_leaves_no_half_artifact(
    store: Storage, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync = os.fsync
    calls = iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        store.put_artifact(PREFIX, folder)

    assert on_disk(tmp_path) == []


def test_every_file_is_forced_to_disk_before_the_manifest_names_it(store: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch):
    fsync, synced = os.fsync, list[str]()

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.rpartition("-")[2])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    store.put_artifact(PREFIX, folder)

    assert {Path(name).name for name in FILES} | {"a1", "sub", "job_1", "artifacts", "store"} <= set(synced)
    assert synced.index(MANIFEST) > max(synced.index(Path(name).name) for name in FILES)


def test_a_folder_that_a_deletion_clears_away_is_made_again(store: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Deleting a job's last artifact removes its empty folder; another attempt may be about to write below it."""
    mkdir = Path.mkdir
    lost = iter([True, True])

    def cleared(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "a1" and next(lost, False):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", cleared)

    assert store.put_artifact(PREFIX, folder)["bytes"] > 0


def test_a_deletion_cut_short_leaves_no_artifact(store: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch):
    store.put_artifact(PREFIX, folder)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.delete(PREFIX)

    assert f"{PREFIX}{MANIFEST}" not in store.list()


@given(st.lists(st.sampled_from(["..", ".", "a", "", "secret", "\\", "/", "%2e%2e", " "]), max_size=6).map("/".join))
def test_no_key_ever_reads_what_was_not_stored(tmp_path_factory: pytest.TempPathFactory, key: str):
    root = tmp_path_factory.getbasetemp() / "outer"
    root.mkdir(exist_ok=True)
    (root / "secret").write_text("secret")

    with pytest.raises(ObjectNotFound):
        FolderStorage(root / "store").open(key)


def test_links_inside_the_store_are_not_followed(store: Storage, tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    root = tmp_path / "store"
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside/secret")

    for key in ("folder/secret", "file"):
        with pytest.raises(ObjectNotFound):
            store.open(key)
        with pytest.raises(ObjectNotFound):
            store.size(key)
    with pytest.raises(ObjectNotFound):
        store.delete("folder/secret")
    store.delete("folder")
    store.delete("file")
    assert (tmp_path / "outside/secret").read_text() == "secret"


def test_a_store_whose_folder_is_gone_is_unavailable_and_is_not_made_anew(store: Storage, folder: Path, tmp_path: Path):
    store.check()
    shutil.rmtree(tmp_path / "store")

    for call in (store.check, lambda: store.put_artifact(PREFIX, folder)):
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert caught.value.retryable
    assert not (tmp_path / "store").exists()


def test_a_check_leaves_nothing_behind_and_reads_what_it_wrote(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store.check()
    assert on_disk(tmp_path) == []

    monkeypatch.setattr(Path, "read_bytes", lambda _: b"")
    with pytest.raises(StorageUnavailable, match="give back"):
        store.check()


def test_free_space_is_that_of_the_stores_disk(store: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.storage.folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(3, 2, 1))  # pyright: ignore

    assert store.free_bytes() == 1


def test_the_store_is_its_owners_alone(store: Storage, folder: Path, tmp_path: Path):
    store.put_artifact(PREFIX, folder)

    assert [oct((tmp_path / "store" / name).stat().st_mode)[-3:] for name in ("", "artifacts/job_1/a1/sub")] == ["700", "700"]


def test_empty_folders_go_with_what_was_in_them(store: Storage, folder: Path, tmp_path: Path):
    store.put_artifact("artifacts/job_1/a2/", folder)
    store.delete("artifacts/job_1/a2")

    assert not (tmp_path / "store/artifacts").exists()


def test_a_known_file_is_a_second_name_of_the_stored_one_even_from_another_disk(
    store: FolderStorage, folder: Path, tmp_path: Path
):
    stored = store.put_file("blocks/x", folder / "model.safetensors")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)  # other bytes on the disk, as a resumed job has them

    store.put_artifact(PREFIX, elsewhere, {"model.safetensors": KnownObject("blocks/x", stored["bytes"], stored["sha256"])})

    root = tmp_path / "store"
    assert (root / PREFIX / "model.safetensors").samefile(root / "blocks/x")


def test_a_known_object_that_has_rotted_is_not_used(store: FolderStorage, folder: Path, tmp_path: Path):
    content = FILES["model.safetensors"]
    stored = store.put_file("blocks/x", folder / "config.json")
    (tmp_path / "store/blocks/x").unlink()
    (tmp_path / "store/blocks/x").write_bytes(bytes(len(content)))

    sha256 = hashlib.sha256(content).hexdigest()
    manifest = store.put_artifact(PREFIX, folder, {"model.safetensors": KnownObject("blocks/x", len(content), sha256)})

    assert stored["bytes"] == 2
    assert {file["sha256"] for file in manifest["files"] if file["path"] == "model.safetensors"} == {sha256}
    assert (tmp_path / "store" / PREFIX / "model.safetensors").read_bytes() == content


def test_unfinished_files_are_swept_when_they_are_old_and_a_new_name_of_an_old_file_is_new(
    store: FolderStorage, folder: Path, tmp_path: Path
):
    store.put_artifact(PREFIX, folder)
    left = tmp_path / "store" / PREFIX / ".part-0-config.json"
    os.utime(folder / "config.json", (0, 0))
    os.link(folder / "config.json", left)

    assert store.sweep_uploads(3600) == 0
    assert left.exists()
    assert store.sweep_uploads(-1) == 1
    assert not left.exists()
    assert len(store.list(PREFIX)) == len(FILES) + 1


def test_the_folder_says_whether_files_become_second_names(store: FolderStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert store.links_from(tmp_path)

    def another_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", another_disk)
    assert not store.links_from(tmp_path)
    assert on_disk(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
