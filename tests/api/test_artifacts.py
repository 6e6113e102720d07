"""Artifacts through HTTP: the manifest, ranges, conditions, signed links."""

from __future__ import annotations

import hashlib
import random
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

import api.routes.artifacts
import api.signing
from jobs.keys import SCOPES, ApiKey, new_key
from tests.api.conftest import Face, OpenFace

WEIGHTS = random.Random(0).randbytes(3 * 2**20 + 17)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "deeper/caf\u00e9 1.txt": b"text", "empty.txt": b""}
SIZE = len(WEIGHTS)


@pytest.fixture
def job(face: Face, tmp_path: Path) -> dict[str, Any]:
    """A job with an artifact."""
    made = face.post_job()
    face.succeed(made["id"], FILES, tmp_path / "out")
    return made


@pytest.fixture
def url(job: dict[str, Any]) -> str:
    """Where the weights are."""
    return f"{job['links']['artifact']}/files/model.safetensors"


def test_the_manifest_names_every_file_with_its_hash(face: Face, job: dict[str, Any]):
    artifact = face.client.get(job["links"]["artifact"]).json()

    assert {file["path"]: (file["bytes"], file["sha256"]) for file in artifact["files"]} == {
        path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in FILES.items()
    }
    assert artifact["bytes"] == sum(map(len, FILES.values()))
    assert artifact["profile"] == "portable"
    left = (datetime.fromisoformat(artifact["expires_at"]) - datetime.now(UTC)).total_seconds()
    assert 0 < left <= 15 * 60


def test_every_link_gives_its_file(face: Face, job: dict[str, Any]):
    for file in face.client.get(job["links"]["artifact"]).json()["files"]:
        answer = face.client.get(file["url"])

        assert (answer.status_code, answer.content) == (200, FILES[file["path"]])
        assert answer.headers["content-type"] == file["media_type"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")


def test_there_is_no_artifact_before_the_job_has_succeeded(face: Face):
    links = face.post_job()["links"]
    answers = [face.client.get(links["artifact"]), face.client.get(f"{links['artifact']}/files/config.json")]
    face.client.post(links["cancel"])
    answers.append(face.client.get(links["artifact"]))

    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(409, "artifact_not_ready")}
    assert [answer.json()["retryable"] for answer in answers] == [True, True, False]


@pytest.mark.parametrize(
    "path", ["nothing.txt", "manifest.json", "../a1/config.json", "..%2F..%2Fdb.sqlite3", "%2Fetc%2Fpasswd", ""]
)
def test_what_the_manifest_does_not_list_is_not_found(face: Face, job: dict[str, Any], path: str):
    answer = face.client.get(f"{job['links']['artifact']}/files/{path}")

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-1048580", 5, 1048581),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        (f"bytes=-{SIZE + 5}", 0, SIZE),
        (f"bytes=0-{10**30}", 0, SIZE),
        ("bytes=0-", 0, SIZE),
    ],
)
def test_a_range_gives_exactly_its_bytes(face: Face, url: str, asked: str, start: int, stop: int):
    answer = face.client.get(url, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.content == WEIGHTS[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "bytes=x-y", "items=0-1", "bytes=0-1,5-6", "0-1"])
def test_what_is_not_one_range_of_bytes_is_ignored(face: Face, url: str, asked: str):
    answer = face.client.get(url, headers={"Range": asked})

    assert (answer.status_code, len(answer.content), answer.headers["accept-ranges"]) == (200, SIZE, "bytes")


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={10**30}-", "bytes=-0"])
def test_a_range_outside_the_file_cannot_be_satisfied(face: Face, url: str, asked: str):
    answer = face.client.get(url, headers={"Range": asked})

    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_a_download_that_was_cut_continues_with_range_and_if_match(face: Face, url: str):
    head = face.client.get(url, headers={"Range": "bytes=0-999999"})
    rest = face.client.get(url, headers={"Range": "bytes=1000000-", "If-Match": head.headers["etag"]})
    stale = face.client.get(url, headers={"Range": "bytes=1000000-", "If-Match": '"another"'})

    assert hashlib.sha256(head.content + rest.content).hexdigest() == head.headers["etag"].strip('"')
    assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")


def test_a_range_of_another_file_gives_the_whole_file(face: Face, url: str):
    tag = face.client.get(url).headers["etag"]

    same = face.client.get(url, headers={"Range": "bytes=0-9", "If-Range": tag})
    other = face.client.get(url, headers={"Range": "bytes=0-9", "If-Range": '"another"'})

    assert (same.status_code, len(same.content)) == (206, 10)
    assert (other.status_code, len(other.content)) == (200, SIZE)


def test_a_file_that_the_caller_has_is_not_sent_again(face: Face, url: str):
    tag = face.client.get(url).headers["etag"]

    answer = face.client.get(url, headers={"If-None-Match": tag})

    assert (answer.status_code, answer.content) == (304, b"")


def test_head_says_how_long_a_file_is_without_opening_it(face: Face, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(face.service.storage), "open", lambda *_: pytest.fail("the file was opened"))

    answer = face.client.head(url)

    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(SIZE), b"")


def test_a_file_is_read_in_pieces(face: Face, url: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    chunks = api.routes.artifacts._chunks  # pyright: ignore[reportPrivateUsage]

    class Noted:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def read(self, size: int) -> bytes:
            asked.append(size)
            return self.stream.read(size)

        def __enter__(self) -> Noted:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

    def noted(stream: Any, length: int) -> Iterator[bytes]:
        return chunks(Noted(stream), length)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(api.routes.artifacts, "_chunks", noted)

    assert face.client.get(url).content == WEIGHTS
    assert len(asked) == 4
    assert max(asked) <= 2**20


@pytest.fixture
def guarded(open_face: OpenFace, tmp_path: Path) -> Iterator[tuple[Face, dict[str, str], str]]:
    """A service with a key, the header that shows it, and a signed link to the weights."""
    key, entry = new_key("ann", SCOPES)
    headers = {"Authorization": f"Bearer {key}"}
    with open_face(api_keys=(ApiKey.parse(entry),)) as face:
        made = face.client.post("/v1/jobs", json=face.body(), headers=headers).json()
        face.succeed(made["id"], FILES, tmp_path / "out")
        files = face.client.get(made["links"]["artifact"], headers=headers).json()["files"]
        yield face, headers, next(file["url"] for file in files if file["path"] == "model.safetensors")


Guarded = tuple[Face, dict[str, str], str]


def test_a_signed_link_needs_no_key(guarded: Guarded):
    face, headers, link = guarded
    plain = link.partition("?")[0]

    assert face.client.get(link, headers={"Range": "bytes=0-9"}).content == WEIGHTS[:10]
    assert face.client.get(plain).status_code == 401
    assert face.client.get(plain, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"signature": "0" * 64},
        {"expires": "99999999999"},
        {"artifact": "a2"},
        {"sha256": "0" * 64},
    ],
)
def test_a_changed_link_is_refused_even_with_a_key(guarded: Guarded, change: dict[str, str]):
    face, headers, link = guarded
    parts = urlsplit(link)
    changed = f"{parts.path}?{urlencode({**dict(parse_qsl(parts.query)), **change})}"

    for answer in (face.client.get(changed), face.client.get(changed, headers=headers)):
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key")


def test_a_link_opens_no_other_file(guarded: Guarded):
    face, _, link = guarded

    answer = face.client.get(link.replace("model.safetensors", "config.json"))

    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_api_key")


def test_a_link_ends_after_a_quarter_of_an_hour(guarded: Guarded, monkeypatch: pytest.MonkeyPatch):
    face, _, link = guarded
    now = api.signing.time.time()
    monkeypatch.setattr(api.signing.time, "time", lambda: now + 14 * 60)
    early = face.client.get(link)
    monkeypatch.setattr(api.signing.time, "time", lambda: now + 16 * 60)
    late = face.client.get(link)

    assert early.status_code == 200
    assert (late.status_code, late.json()["code"]) == (401, "invalid_api_key")
    assert "expired" in late.json()["detail"]


def test_a_link_dies_with_its_artifact(guarded: Guarded):
    face, headers, link = guarded

    face.client.delete(link.partition("/artifact")[0], headers=headers)

    assert face.client.get(link).status_code == 404


def test_the_secret_outlives_the_process_and_is_its_owners_alone(guarded: Guarded):
    face, _, link = guarded
    folder = face.service.settings.data_dir
    again = api.signing.LinkSigner.of(face.service.settings)
    parts = dict(parse_qsl(urlsplit(link).query))
    job_id = link.split("/")[3]

    again.check(
        api.signing.Link(job_id, parts["artifact"], "model.safetensors", parts["sha256"], int(parts["expires"])),
        parts["signature"],
    )
    assert stat.S_IMODE((folder / "signing.key").stat().st_mode) == 0o600
    assert [path.name for path in folder.glob("signing.key*")] == ["signing.key"]
