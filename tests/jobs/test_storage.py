"""The store: whole or not at all, hashed, and nothing outside its root."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs.storage
from compression.errors import DiskFull
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.storage import (
    MANIFEST,
    FolderStorage,
    ObjectNotFound,
    Storage,
    as_manifest,
    manifest_bytes,
    manifest_sha256,
    media_type,
    open_storage,
)

PREFIX = "artifacts/job_1/a1/"
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(2**20 + 5), "sub/merges.txt": b"a b\n", "empty": b""}


@pytest.fixture
def store(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


def on_disk(tmp_path: Path) -> list[str]:
    root = tmp_path / "store"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_what_is_put_comes_back_and_the_manifest_says_what_it_is(store: Storage, folder: Path):
    manifest = store.put_artifact(PREFIX, folder)

    assert [file["path"] for file in manifest["files"]] == sorted(FILES)
    assert manifest["bytes"] == sum(map(len, FILES.values()))
    for file in manifest["files"]:
        content = FILES[file["path"]]
        with store.open(PREFIX + file["path"]) as stream:
            assert stream.read() == content
        assert store.size(PREFIX + file["path"]) == file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert store.list(PREFIX) == sorted(PREFIX + name for name in [*FILES, MANIFEST])


def test_the_stored_manifest_is_the_returned_one_and_its_hash_covers_every_file(store: Storage, folder: Path):
    manifest = store.put_artifact(PREFIX, folder)
    with store.open(PREFIX + MANIFEST) as stream:
        stored = stream.read()
    changed = json.loads(stored)
    changed["files"][0]["sha256"] = "0" * 64

    assert stored == manifest_bytes(manifest) == manifest_bytes(as_manifest(json.loads(stored)))
    assert manifest_sha256(manifest) == hashlib.sha256(stored).hexdigest() != manifest_sha256(as_manifest(changed))


def test_a_stream_may_begin_anywhere(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    with store.open(f"{PREFIX}model.safetensors", 2**20) as stream:
        assert stream.read() == FILES["model.safetensors"][2**20 :]


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


def test_scratch_that_is_removed_or_rewritten_does_not_touch_what_was_stored(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)
    shutil.rmtree(folder)

    with store.open(f"{PREFIX}config.json") as stream:
        assert stream.read() == b"{}"


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
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removeprefix(".part-"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    store.put_artifact(PREFIX, folder)

    assert {Path(name).name for name in FILES} | {"a1", "sub", "job_1", "artifacts", "store"} <= set(synced)
    assert synced.index(MANIFEST) > max(synced.index(Path(name).name) for name in FILES)


def test_a_prefix_is_written_once(store: Storage, folder: Path):
    first = store.put_artifact(PREFIX, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"changed")

    with pytest.raises(StorageUnavailable, match="once"):
        store.put_artifact(PREFIX, folder)

    with store.open(f"{PREFIX}config.json") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == first["files"][0]["sha256"]


def test_deleting_is_idempotent_and_takes_nothing_else(store: Storage, folder: Path, tmp_path: Path):
    store.put_artifact(PREFIX, folder)
    store.put_artifact("artifacts/job_1/a2/", folder)
    store.put_artifact("artifacts/job_2/a1/", folder)

    for _ in range(2):
        store.delete(PREFIX)
    store.delete("artifacts/job_9/a1/")

    assert {key.rsplit("/a", 1)[0] + "/a" + key.rsplit("/a", 1)[1][0] for key in store.list()} == {
        "artifacts/job_1/a2", "artifacts/job_2/a1"
    }  # fmt: skip
    store.delete("artifacts/job_1/a2")
    assert not (tmp_path / "store/artifacts/job_1").exists(), "empty folders go too"


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


def test_one_object_can_be_deleted_by_its_key(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    store.delete(f"{PREFIX}empty")

    assert store.list(PREFIX) == sorted(PREFIX + name for name in [*FILES, MANIFEST] if name != "empty")


BAD_KEYS = ["../secret", "artifacts/../../secret", "/etc/passwd", "a//b", "a/./b", "", "/", "..", "a\\..\\b", "a\x00b", "a\nb"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_no_key_leads_out_of_the_root(store: FolderStorage, folder: Path, tmp_path: Path, key: str):
    (tmp_path / "secret").write_text("secret")

    for call in (store.open, store.size, store.delete, lambda key: store.put_artifact(key, folder)):
        with pytest.raises(StorageUnavailable):
            call(key)
    assert (tmp_path / "secret").read_text() == "secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "secret", "store"]


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


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_an_artifact_with_a_link_or_a_pipe_is_not_stored(store: Storage, folder: Path, tmp_path: Path, kind: str):
    match kind:
        case "file":
            (folder / "z.json").symlink_to("/etc/passwd")
        case "folder":
            (folder / "z").symlink_to("/etc")
        case _:
            os.mkfifo(folder / "z")

    with pytest.raises(StorageUnavailable, match="z"):
        store.put_artifact(PREFIX, folder)
    assert on_disk(tmp_path) == []


def test_an_artifact_may_not_bring_its_own_manifest(store: Storage, folder: Path):
    (folder / MANIFEST).write_text("{}")

    with pytest.raises(StorageUnavailable, match=MANIFEST):
        store.put_artifact(PREFIX, folder)


def test_a_folder_or_nothing_is_no_object(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    for key in (PREFIX, f"{PREFIX}nothing", f"{PREFIX}config.json/below"):
        with pytest.raises(ObjectNotFound):
            store.open(key)


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
    monkeypatch.setattr(jobs.storage.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(3, 2, 1))  # pyright: ignore

    assert store.free_bytes() == 1


def test_the_store_is_its_owners_alone(store: Storage, folder: Path, tmp_path: Path):
    store.put_artifact(PREFIX, folder)

    assert [oct((tmp_path / "store" / name).stat().st_mode)[-3:] for name in ("", "artifacts/job_1/a1/sub")] == ["700", "700"]


def test_the_settings_say_where_the_store_is(tmp_path: Path, folder: Path):
    elsewhere = f"file://{tmp_path}/elsewhere"
    open_storage(Settings(data_dir=tmp_path / "data")).put_artifact(PREFIX, folder)
    open_storage(Settings(data_dir=tmp_path / "data", storage_url=elsewhere)).put_artifact(PREFIX, folder)

    for root in ("data/objects", "elsewhere"):
        assert (tmp_path / root / PREFIX / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00001-of-00002.safetensors", "application/vnd.safetensors"),
        ("config.json", "application/json"),
        ("README.md", "text/markdown; charset=utf-8"),
        ("tokenizer.model", "application/octet-stream"),
    ],
)
def test_a_file_has_the_media_type_of_its_ending(name: str, kind: str):
    assert media_type(name) == kind
