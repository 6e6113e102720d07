"""What every store does: whole or not at all, hashed, and the manifest last. A folder and a bucket in turn."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compression.errors import SlimtrimError
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.storage import (
    MANIFEST,
    FolderStorage,
    KnownObject,
    ObjectNotFound,
    S3Storage,
    Storage,
    as_manifest,
    manifest_bytes,
    manifest_sha256,
    media_type,
    open_storage,
)
from tests.jobs.conftest import FILES, PREFIX

WEIGHTS = "model.safetensors"


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


def test_scratch_that_is_removed_or_rewritten_does_not_touch_what_was_stored(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)
    shutil.rmtree(folder)

    with store.open(f"{PREFIX}config.json") as stream:
        assert stream.read() == b"{}"


def test_a_prefix_is_written_once(store: Storage, folder: Path):
    first = store.put_artifact(PREFIX, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"changed")

    with pytest.raises(StorageUnavailable, match="once"):
        store.put_artifact(PREFIX, folder)

    with store.open(f"{PREFIX}config.json") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == first["files"][0]["sha256"]


def test_one_object_can_be_deleted_by_its_key(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    store.delete(f"{PREFIX}empty")

    assert store.list(PREFIX) == sorted(PREFIX + name for name in [*FILES, MANIFEST] if name != "empty")


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
    assert store.list() == []


def test_an_artifact_may_not_bring_its_own_manifest(store: Storage, folder: Path):
    (folder / MANIFEST).write_text("{}")

    with pytest.raises(StorageUnavailable, match=MANIFEST):
        store.put_artifact(PREFIX, folder)


def test_a_folder_or_nothing_is_no_object(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    for key in (PREFIX, f"{PREFIX}nothing", f"{PREFIX}config.json/below"):
        with pytest.raises(ObjectNotFound):
            store.open(key)


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


def test_the_settings_say_where_the_store_is(tmp_path: Path, folder: Path):
    elsewhere = f"file://{tmp_path}/elsewhere"
    open_storage(Settings(data_dir=tmp_path / "data")).put_artifact(PREFIX, folder)
    open_storage(Settings(data_dir=tmp_path / "data", storage_url=elsewhere)).put_artifact(PREFIX, folder)

    for root in ("data/objects", "elsewhere"):
        assert (tmp_path / root / PREFIX / MANIFEST).is_file()
    assert isinstance(open_storage(Settings(data_dir=tmp_path / "data", storage_url="s3://bucket/prefix")), S3Storage)


BAD_KEYS = ["../secret", "artifacts/../../secret", "/etc/passwd", "a//b", "a/./b", "", "/", "..", "a\\..\\b", "a\x00b", "a\nb"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_no_key_leads_out_of_the_root(store: Storage, folder: Path, tmp_path: Path, key: str):
    (tmp_path / "secret").write_text("secret")
    calls = (
        store.open, store.size, store.delete, lambda key: store.put_artifact(key, folder), lambda key: store.link(key, 9, "x"),
        lambda key: store.put_file(key, folder / "empty"), lambda key: store.get_file(key, tmp_path / "secret"),
    )  # fmt: skip

    for call in calls[: 4 if isinstance(store, FolderStorage) else 7]:
        with pytest.raises(StorageUnavailable):
            call(key)
    for call in calls[5:]:
        with pytest.raises(StorageUnavailable):
            call(key)
    assert (tmp_path / "secret").read_text() == "secret"
    assert store.list() == []


def test_deleting_is_idempotent_and_takes_nothing_else(store: Storage, folder: Path):
    for prefix in (PREFIX, "artifacts/job_1/a10/", "artifacts/job_1/a2/", "artifacts/job_2/a1/"):
        store.put_artifact(prefix, folder)

    for _ in range(2):
        store.delete(PREFIX)
    store.delete("artifacts/job_9/a1/")
    store.delete("artifacts/job_1/a2")

    assert {"/".join(key.split("/")[:3]) for key in store.list()} == {"artifacts/job_1/a10", "artifacts/job_2/a1"}
    assert len(store.list()) == 2 * (len(FILES) + 1)


def test_a_check_leaves_nothing_behind(store: Storage):
    store.check()

    assert store.list() == []


def test_one_file_goes_in_and_out_whole_and_a_second_time_changes_nothing(store: Storage, folder: Path, tmp_path: Path):
    first = store.put_file("blocks/ann/f1/shard-1", folder / WEIGHTS)
    again = store.put_file("blocks/ann/f1/shard-1", folder / WEIGHTS)
    store.get_file("blocks/ann/f1/shard-1", tmp_path / "deep" / "back", first["sha256"])

    assert first == again
    assert (first["path"], first["bytes"]) == (WEIGHTS, len(FILES[WEIGHTS]))
    assert first["sha256"] == hashlib.sha256((tmp_path / "deep" / "back").read_bytes()).hexdigest()
    assert store.list("blocks") == ["blocks/ann/f1/shard-1"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["back"]


def test_other_bytes_under_the_same_key_replace_the_first(store: Storage, folder: Path, tmp_path: Path):
    store.put_file("blocks/x", folder / WEIGHTS)
    store.put_file("blocks/x", folder / "config.json")
    store.get_file("blocks/x", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == FILES["config.json"]


def test_bytes_that_are_not_those_that_were_stored_are_not_handed_out(store: Storage, folder: Path, tmp_path: Path):
    store.put_file("blocks/x", folder / WEIGHTS)
    (tmp_path / "back").write_bytes(b"before")

    with pytest.raises(StorageUnavailable) as caught:
        store.get_file("blocks/x", tmp_path / "back", "0" * 64)

    assert caught.value.retryable
    assert (tmp_path / "back").read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} <= {"back", "out", "store"}


def test_what_is_written_to_a_copy_does_not_change_the_object(store: Storage, folder: Path, tmp_path: Path):
    stored = store.put_file("blocks/x", folder / WEIGHTS)
    store.get_file("blocks/x", tmp_path / "back")
    with (tmp_path / "back").open("r+b") as file:
        file.write(b"changed")
    store.get_file("blocks/x", tmp_path / "again", stored["sha256"])

    assert (tmp_path / "again").read_bytes() == FILES[WEIGHTS]


def test_nothing_is_not_found(store: Storage, tmp_path: Path):
    for call in (lambda: store.size("blocks/x"), lambda: store.get_file("blocks/x", tmp_path / "back")):
        with pytest.raises(ObjectNotFound) as caught:
            call()
        assert not caught.value.retryable
    assert not (tmp_path / "back").exists()


def known(store: Storage, folder: Path, **changes: Any) -> dict[str, KnownObject]:
    stored = store.put_file("blocks/x", folder / WEIGHTS)
    facts = {"key": "blocks/x", "bytes": stored["bytes"], "sha256": stored["sha256"], **changes}
    return {WEIGHTS: KnownObject(**facts)}


@pytest.mark.parametrize(
    "changes", [{}, {"sha256": "0" * 64}, {"bytes": 5}, {"key": "blocks/gone"}], ids=["true", "hash", "bytes", "gone"]
)
def test_an_artifact_is_the_same_whatever_is_said_to_be_known(store: Storage, folder: Path, changes: dict[str, Any]):
    plain = store.put_artifact("artifacts/job_1/a1/", folder)

    manifest = store.put_artifact("artifacts/job_1/a2/", folder, known(store, folder, **changes))

    assert manifest == plain
    store.delete("blocks")
    with store.open(f"artifacts/job_1/a2/{WEIGHTS}") as stream:
        assert stream.read() == FILES[WEIGHTS]


def test_a_file_that_has_changed_since_it_became_known_is_stored_as_it_is_now(store: Storage, folder: Path):
    told = known(store, folder)
    changed = b"x" * len(FILES[WEIGHTS])
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(changed)

    store.put_artifact(PREFIX, folder, told)

    with store.open(PREFIX + WEIGHTS) as stream:
        assert stream.read() == changed


def test_a_stream_from_the_end_is_empty(store: Storage, folder: Path):
    store.put_artifact(PREFIX, folder)

    for name, content in FILES.items():
        with store.open(PREFIX + name, len(content)) as stream:
            assert stream.read() == b""


def test_an_error_of_ours_is_all_that_a_store_raises(store: Storage, folder: Path):
    (folder / "unreadable").mkdir()
    with pytest.raises(SlimtrimError):
        store.put_file("blocks/x", folder / "unreadable")
    with pytest.raises(SlimtrimError):
        store.put_file("blocks/x", folder / "nothing")

    assert store.list() == []
