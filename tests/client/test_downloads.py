"""Downloads over real sockets: cut, changed, damaged, expired, hostile; in the end the very bytes, or an error by name."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimtrim_client import AsyncClient, CannotWrite, Client, Damaged, DiskFull, Refused, UnexpectedAnswer, Unreachable
from slimtrim_client.artifacts import WantedFile
from slimtrim_client.parts import Part
from tests.client import scripted
from tests.client.scripted import HANG_UP, HASTY, Reply, Scripted, Seen

MANIFEST = "GET /v1/jobs/job_x/artifact"
CONTENT = random.Random(0).randbytes(300_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Store:
    """Serves files by ranges as the service does, and misbehaves as told."""

    def __init__(self, server: Scripted, files: dict[str, bytes]) -> None:
        self.server = server
        self.files = dict(files)
        self.generation = 0
        """Links of another generation have expired."""
        self.cuts: list[int | None] = []
        """After how many bytes each answer is cut, in order; then none."""
        self.damaged = 0
        """How many answers have a wrong byte."""
        self.ranges = True
        server.answers[MANIFEST] = self._manifest
        for path in files:
            server.answers[f"GET /files/{path}"] = self._file

    def asked(self) -> list[Seen]:
        return [seen for seen in self.server.seen if seen.path.startswith("/files/")]

    def _manifest(self, seen: Seen) -> Reply:
        files = [
            {"path": path, "bytes": len(content), "sha256": sha256(content), "media_type": "x",
             "url": f"/files/{path}?generation={self.generation}"}
            for path, content in self.files.items()
        ]  # fmt: skip
        total = sum(map(len, self.files.values()))
        return Reply(200, {"files": files, "bytes": total, "profile": "portable", "expires_at": "2026-01-01T00:00:00Z"})

    def _file(self, seen: Seen) -> Reply:
        if seen.query["generation"] != str(self.generation):
            return scripted.problem(401, "invalid_api_key", "the link has expired")
        content = self.files[seen.path.removeprefix("/files/")]
        tag = f'"{sha256(content)}"'
        if seen.headers.get("if-match", tag) != tag:
            return scripted.problem(412, "precondition_failed", "not that file any more")
        wanted = re.fullmatch(r"bytes=(\d+)-", seen.headers.get("range", ""))
        start = int(wanted[1]) if wanted and self.ranges else 0
        body = content[start:]
        if self.damaged:
            self.damaged -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        headers = {"ETag": tag} | ({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {})
        return Reply(206 if start else 200, body, headers, cut=self.cuts.pop(0) if self.cuts else None)


@pytest.fixture
def store(server: Scripted) -> Store:
    return Store(server, {"model.safetensors": CONTENT})


def fetch(server: Scripted, folder: Path, **options: Any):
    with Client(server.url, patience=HASTY) as client:
        return client.download("job_x", folder, **options)


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", range(5))
def test_a_download_that_is_cut_anywhere_goes_on_there(store: Store, tmp_path: Path, seed: int):
    store.cuts = [random.Random(seed).randrange(1, 100_000) for _ in range(6)]

    got = fetch(store.server, tmp_path)

    asked = store.asked()
    offsets = [int((seen.headers.get("range") or "bytes=0-")[6:-1]) for seen in asked]
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT
    assert got.bytes == len(CONTENT)
    assert offsets == sorted(offsets)
    assert {seen.headers.get("if-match") for seen in asked[1:]} <= {f'"{sha256(CONTENT)}"'}
    assert left_in(tmp_path) == ["model.safetensors"]


def test_another_process_goes_on_where_one_was_interrupted(store: Store, tmp_path: Path):
    store.cuts = [1000, 0, 0, 0]
    with pytest.raises(Unreachable, match="at byte 1,000 of 300,000"):
        fetch(store.server, tmp_path)
    left = left_in(tmp_path)
    before = len(store.asked())

    got = fetch(store.server, tmp_path)

    assert left == ["model.safetensors.part", "model.safetensors.part.json"]
    assert [seen.headers["range"] for seen in store.asked()[before:]] == ["bytes=1000-"]
    assert got.files[0].path.read_bytes() == CONTENT


def test_a_part_that_somebody_spoilt_does_not_get_through(store: Store, tmp_path: Path):
    store.cuts = [1000, 0, 0, 0]
    with pytest.raises(Unreachable):
        fetch(store.server, tmp_path)
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * 1000)

    got = fetch(store.server, tmp_path)

    assert got.files[0].path.read_bytes() == CONTENT


def test_the_part_of_another_artifact_is_not_gone_on_with(store: Store, tmp_path: Path):
    store.cuts = [1000, 0, 0, 0]
    with pytest.raises(Unreachable):
        fetch(store.server, tmp_path)
    store.files["model.safetensors"] = CONTENT[::-1]
    before = len(store.asked())

    got = fetch(store.server, tmp_path)

    assert got.files[0].path.read_bytes() == CONTENT[::-1]
    assert "range" not in store.asked()[before].headers


def test_what_is_there_is_not_fetched_again(store: Store, tmp_path: Path):
    first = fetch(store.server, tmp_path)
    again = fetch(store.server, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(CONTENT[:-1] + b"?")
    third = fetch(store.server, tmp_path)

    assert [each.files[0].fetched for each in (first, again, third)] == [True, False, True]
    assert len(store.asked()) == 2
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


def test_a_damaged_file_is_fetched_once_more(store: Store, tmp_path: Path):
    store.damaged = 1

    got = fetch(store.server, tmp_path)

    assert got.files[0].path.read_bytes() == CONTENT
    assert len(store.asked()) == 2


def test_a_file_that_is_always_damaged_is_refused_and_not_kept(store: Store, tmp_path: Path):
    store.damaged = 99

    with pytest.raises(Damaged, match=f"arrived twice with another content than the manifest says.*{sha256(CONTENT)}"):
        fetch(store.server, tmp_path)

    assert len(store.asked()) == 2
    assert left_in(tmp_path) == []


def test_a_file_that_does_not_end_is_not_read_to_its_end(store: Store, tmp_path: Path):
    endless = Reply(200, CONTENT + b"x" * 10_000_000)
    store.server.answers["GET /files/model.safetensors"] = lambda seen: endless
    written: list[int] = []

    with pytest.raises(Damaged):
        fetch(store.server, tmp_path, on_progress=lambda path, done, size: written.append(done))

    assert max(written) <= len(CONTENT) + 1


def test_expired_links_are_replaced(store: Store, tmp_path: Path):
    def expire(path: str, done: int, size: int) -> None:
        if done >= 1000:
            store.generation = 1

    store.cuts = [1000]
    got = fetch(store.server, tmp_path, on_progress=expire)

    assert got.files[0].path.read_bytes() == CONTENT
    assert [seen.query["generation"] for seen in store.asked()] == ["0", "0", "1"]
    assert len(store.server.asked(MANIFEST)) == 2


def test_a_fresh_link_that_is_refused_as_well_is_told(store: Store, tmp_path: Path):
    store.server.answers["GET /files/model.safetensors"] = [scripted.problem(403, "AccessDenied", "not you")]

    with pytest.raises(Refused, match="not you"):
        fetch(store.server, tmp_path)

    assert len(store.asked()) == 2


def test_an_artifact_that_changes_meanwhile_is_fetched_from_the_start(store: Store, tmp_path: Path):
    def replace(path: str, done: int, size: int) -> None:
        if done >= 1000:
            store.files["model.safetensors"] = CONTENT[::-1]
            store.generation = 1

    store.cuts = [1000]
    got = fetch(store.server, tmp_path, on_progress=replace)

    assert got.files[0].path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("status", [412, 416])
def test_a_part_that_the_store_does_not_know_is_fetched_anew(store: Store, tmp_path: Path, status: int):
    serve, refused = store._file, list[Seen]()

    def once(seen: Seen) -> Reply:
        if "range" in seen.headers and not refused:
            refused.append(seen)
            return Reply(status)
        return serve(seen)

    store.cuts = [1000]
    store.server.answers["GET /files/model.safetensors"] = once

    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT
    assert "range" not in store.asked()[-1].headers


def test_a_store_without_ranges_is_read_from_the_start(store: Store, tmp_path: Path):
    store.cuts, store.ranges = [1000], False

    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT


def test_a_store_that_is_away_for_a_moment_is_asked_again(store: Store, tmp_path: Path):
    serve, troubles = store._file, [HANG_UP, Reply(503), Reply(500)]
    store.server.answers["GET /files/model.safetensors"] = lambda seen: troubles.pop() if troubles else serve(seen)

    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT


@pytest.mark.parametrize("parallel", [1, 3, 16])
def test_many_files_some_at_a_time(server: Scripted, tmp_path: Path, parallel: int):
    files = {f"{number % 3}/part-{number}": CONTENT[number : number * 1000] for number in range(12)} | {"empty": b""}
    store = Store(server, files)
    store.cuts = [None, 500, None, 7, 3]
    told: dict[str, tuple[int, int]] = {}

    got = fetch(server, tmp_path, parallel=parallel, on_progress=lambda path, done, size: told.update({path: (done, size)}))

    assert {path: (tmp_path / path).read_bytes() for path in left_in(tmp_path)} == files
    assert [file.path.relative_to(tmp_path).as_posix() for file in got.files] == list(files)
    assert told == {path: (len(content), len(content)) for path, content in files.items()}


def test_the_key_goes_to_the_service_and_never_to_the_store(store: Store, tmp_path: Path):
    with Client(store.server.url, key="secret-key") as client:
        client.download("job_x", tmp_path)

    assert store.server.asked(MANIFEST)[0].headers["authorization"] == "Bearer secret-key"
    assert all("authorization" not in seen.headers for seen in store.asked())


HOSTILE = [
    "../escaped", "a/../../escaped", "/tmp/escaped", "a\\..\\escaped", "C:escaped", "", ".", "a//b", "./a", "a/", "a\0b", "a\nb",
    "x.part", "x.part.json",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
def test_a_manifest_with_a_hostile_path_is_refused_before_anything_is_fetched(server: Scripted, tmp_path: Path, path: str):
    store = Store(server, {"good": b"good", path: b"evil"})

    with pytest.raises(Damaged, match="nothing was fetched"):
        fetch(server, tmp_path / "artifact")

    assert store.asked() == []
    assert list(tmp_path.iterdir()) == []


def test_a_name_cannot_be_both_file_and_folder(server: Scripted, tmp_path: Path):
    Store(server, {"a": b"1", "a/b": b"2"})

    with pytest.raises(Damaged, match="both as a file and as a folder"):
        fetch(server, tmp_path)


def test_a_link_that_leads_out_of_the_folder_is_not_followed(server: Scripted, tmp_path: Path):
    outside, target = tmp_path / "outside", tmp_path / "artifact"
    outside.mkdir()
    target.mkdir()
    (target / "deep").symlink_to(outside)
    Store(server, {"deep/er/file": b"evil"})

    with pytest.raises(Damaged, match="by a link"):
        fetch(server, target)

    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file.part"])
def test_a_link_in_the_place_of_a_file_is_not_written_through(server: Scripted, tmp_path: Path, name: str):
    outside, target = tmp_path / "precious", tmp_path / "artifact"
    outside.write_text("precious")
    target.mkdir()
    (target / name).symlink_to(outside)
    Store(server, {"file": b"content"})

    try:
        fetch(server, target)
    except CannotWrite:
        assert name == "file.part"

    assert outside.read_text() == "precious"
    assert not (target / "file").is_symlink()


@pytest.mark.parametrize("link", ["file:///etc/passwd", "ftp://x/y", "//other/host", "relative", ""])
def test_a_link_that_is_none_is_refused(server: Scripted, tmp_path: Path, link: str):
    entry = {"path": "a", "bytes": 1, "sha256": sha256(b"a"), "url": link}
    server.answers[MANIFEST] = [Reply(200, {"files": [entry]})]

    with pytest.raises(UnexpectedAnswer, match="link to 'a'"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("wrong", [{"sha256": "00"}, {"sha256": None}, {"bytes": -1}, {"bytes": "1"}, {"path": 1}])
def test_an_entry_that_says_nothing_to_check_is_refused(server: Scripted, tmp_path: Path, wrong: dict[str, Any]):
    entry = {"path": "a", "bytes": 1, "sha256": sha256(b"a"), "url": "/a"} | wrong
    server.answers[MANIFEST] = [Reply(200, {"files": [entry]})]

    with pytest.raises(UnexpectedAnswer, match="the manifest"):
        fetch(server, tmp_path)


def test_what_does_not_fit_the_disk_is_not_begun(server: Scripted, tmp_path: Path):
    entry = {"path": "a", "bytes": 2**62, "sha256": sha256(b"a"), "url": "/a"}
    server.answers[MANIFEST] = [Reply(200, {"files": [entry]})]

    with pytest.raises(DiskFull, match="make room"):
        fetch(server, tmp_path)

    assert left_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT RUN: there is no /dev/full here")
def test_a_disk_that_is_full_is_named_and_the_part_stays(tmp_path: Path):
    part = Part(tmp_path, WantedFile("model.safetensors", len(CONTENT), sha256(CONTENT)))
    part.open()
    assert part._out is not None
    os.dup2(os.open("/dev/full", os.O_RDWR), part._out.fileno())

    with pytest.raises(DiskFull, match=re.escape(str(tmp_path / "model.safetensors.part"))):
        part.write(CONTENT)

    assert left_in(tmp_path) == ["model.safetensors.part", "model.safetensors.part.json"]


def test_two_downloads_do_not_write_one_part(store: Store, tmp_path: Path):
    other = Part(tmp_path, WantedFile("model.safetensors", len(CONTENT), sha256(CONTENT)))
    other.open()

    with pytest.raises(CannotWrite, match="another download"):
        fetch(store.server, tmp_path)
    other.close()

    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT


def test_a_folder_that_is_a_file_is_named(store: Store, tmp_path: Path):
    (tmp_path / "artifact").write_text("")

    with pytest.raises(CannotWrite, match="artifact"):
        fetch(store.server, tmp_path / "artifact")


def test_a_cancelled_download_ends_and_leaves_a_part_that_is_gone_on_with(store: Store, tmp_path: Path):
    async def cancelled() -> None:
        async with AsyncClient(store.server.url, patience=HASTY) as client:
            task = asyncio.ensure_future(client.download("job_x", tmp_path, on_progress=lambda *now: now[1] and task.cancel()))
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    left = left_in(tmp_path)

    assert "model.safetensors.part" in left
    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """What Python does at Ctrl-C, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interruption_of_the_caller_ends_the_download_in_its_thread(store: Store, tmp_path: Path):
    def interrupt(path: str, done: int, size: int) -> None:
        if done:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fetch(store.server, tmp_path, on_progress=interrupt)

    assert [thread.name for thread in threading.enumerate() if thread.name == "slimtrim-download"] == []
    assert fetch(store.server, tmp_path).files[0].path.read_bytes() == CONTENT
