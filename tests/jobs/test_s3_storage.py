"""What is true of the bucket alone: parts, links, wrong credentials, and a network that misbehaves."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from compression.errors import DiskFull
from jobs.buckets import Kind, failure_of
from jobs.errors import StorageUnavailable
from jobs.settings import Settings
from jobs.storage import MANIFEST, KnownObject, ObjectNotFound, S3Storage
from jobs.tether import with_our_modules
from tests.bad_proxy import BadProxy, Faults, a_bad_proxy
from tests.jobs.conftest import FILES, PREFIX
from tests.servers import Bucket

WEIGHTS = "model.safetensors"
MIB = 2**20


@pytest.fixture
def store(bucket: Bucket) -> S3Storage:
    return a_store(bucket)


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[BadProxy]:
    with a_bad_proxy(bucket.port, http=True) as running:
        yield running


@pytest.fixture
def far(bucket: Bucket, proxy: BadProxy) -> S3Storage:
    """The same store, reached through the proxy."""
    return a_store(bucket, s3_endpoint_url=proxy.url)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    path.write_bytes(os.urandom(6 * MIB + 1))
    return path


def a_store(bucket: Bucket, **settings: Any) -> S3Storage:
    made = S3Storage(Settings(**{**bucket.settings, **settings}))
    made.part_bytes = 5 * MIB  # S3 takes no smaller part but the last
    return made


def uploads(bucket: Bucket) -> list[str]:
    found = bucket.client().list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix)
    return [upload["Key"] for upload in found.get("Uploads", [])]


def raw_keys(bucket: Bucket) -> list[str]:
    return [item["Key"] for item in bucket.client().list_objects_v2(Bucket=bucket.name, Prefix=bucket.prefix).get("Contents", [])]


def test_a_file_that_is_sent_in_parts_comes_back_with_the_hash_of_the_whole(
    store: S3Storage, bucket: Bucket, large: Path, tmp_path: Path
):
    stored = store.put_file("blocks/x", large)
    store.get_file("blocks/x", tmp_path / "back", stored["sha256"])

    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert stored["sha256"] == hashlib.sha256(large.read_bytes()).hexdigest()
    head = bucket.client().head_object(Bucket=bucket.name, Key=f"{bucket.prefix}/blocks/x")
    assert head["Metadata"] == {"sha256": stored["sha256"]}
    assert head["ETag"].endswith('-2"'), "what the server calls an ETag is no hash of the file"
    assert uploads(bucket) == []


def test_a_store_may_be_a_whole_bucket(bucket: Bucket, folder: Path):
    whole = a_store(bucket, storage_url=f"s3://{bucket.name}")
    prefix = f"{bucket.prefix}/a1"
    whole.put_artifact(prefix, folder)

    assert whole.list(prefix) == sorted([f"{prefix}/{name}" for name in [*FILES, MANIFEST]])
    assert set(whole.list(prefix)) <= set(whole.list())


KILLED = """
import sys
from pathlib import Path
from jobs.settings import Settings
from jobs.storage import S3Storage
store = S3Storage(Settings(storage_url=sys.argv[1], s3_endpoint_url=sys.argv[2]))
store.part_bytes = 5 * 2**20
store.put_artifact("artifacts/job_1/a1/", Path(sys.argv[3]))
"""


def test_an_upload_that_is_killed_shows_nothing_and_is_swept(
    store: S3Storage, bucket: Bucket, proxy: BadProxy, folder: Path, large: Path
):
    large.rename(folder / "a.safetensors")
    proxy.faults = Faults(stall_up=MIB)
    arguments = [bucket.settings["storage_url"], proxy.url, str(folder)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=with_our_modules(os.environ))
    end = time.monotonic() + 30
    while proxy.bytes_up < MIB:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.cut_all()

    # Nobody can read it, and whoever tidies up finds it.
    with pytest.raises(ObjectNotFound):
        store.open("artifacts/job_1/a1/a.safetensors")
    assert store.list() == ["artifacts/job_1/a1/a.safetensors"]
    assert uploads(bucket) == [f"{bucket.prefix}/artifacts/job_1/a1/a.safetensors"]
    assert store.sweep_uploads(3600) == 0
    assert store.sweep_uploads(-60) == 1
    assert uploads(bucket) == []
    assert (store.sweep_uploads(-60), store.list()) == (0, [])


def test_what_is_deleted_includes_uploads_that_never_ended(store: S3Storage, bucket: Bucket):
    client = bucket.client()
    for key in ("a/b/x", "a/b", "a/bc"):
        client.create_multipart_upload(Bucket=bucket.name, Key=f"{bucket.prefix}/{key}")

    store.delete("a/b/")

    assert uploads(bucket) == [f"{bucket.prefix}/a/bc"]


def test_only_uploads_below_our_prefix_are_swept(store: S3Storage, bucket: Bucket):
    client = bucket.client()
    for key in (f"{bucket.prefix}-not/x", f"{bucket.prefix}/x"):
        client.create_multipart_upload(Bucket=bucket.name, Key=key)

    assert store.sweep_uploads(-60) == 1
    assert uploads(bucket) == [f"{bucket.prefix}-not/x"]


def test_a_probe_that_was_left_behind_is_swept(store: S3Storage, bucket: Bucket):
    bucket.client().put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/.part-1", Body=b"probe")

    assert (store.sweep_uploads(3600), store.sweep_uploads(-60)) == (0, 1)
    assert raw_keys(bucket) == []


def test_a_link_serves_ranges_and_conditions_and_nothing_else(store: S3Storage, folder: Path):
    store.put_artifact(PREFIX, folder)
    content, url = FILES[WEIGHTS], store.link(PREFIX + WEIGHTS, 60, "model \u00e9.safetensors")

    whole = httpx.get(url)
    part = httpx.get(url, headers={"Range": "bytes=10-19", "If-Match": whole.headers["etag"]})
    wrong = httpx.get(url, headers={"Range": "bytes=10-19", "If-Match": '"0"'})

    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''model%20%C3%A9.safetensors"
    assert (part.status_code, part.content) == (206, content[10:20])
    assert wrong.status_code == 412
    for tampered in (
        url.replace(WEIGHTS, "config.json"),
        url[:-1] + "xy"[url[-1] == "x"],
        url.replace("Expires=60", "Expires=999"),
    ):
        assert httpx.get(tampered).status_code == 403
    assert httpx.put(url, content=b"x").status_code == 403
    assert httpx.delete(url).status_code == 403
    assert httpx.head(store.link(PREFIX + WEIGHTS, 60, "x", "HEAD")).headers["content-length"] == str(len(content))


def test_a_link_ends(store: S3Storage, folder: Path):
    store.put_artifact(PREFIX, folder)
    url = store.link(f"{PREFIX}config.json", 1, "config.json")
    end = time.monotonic() + 30
    while (answer := httpx.get(url)).status_code == 200:
        assert answer.content == b"{}"
        assert time.monotonic() < end
        time.sleep(0.1)

    assert answer.status_code == 403


def test_links_are_made_for_the_address_that_callers_know(bucket: Bucket, proxy: BadProxy, folder: Path):
    store = a_store(bucket, s3_public_url=proxy.url)
    store.put_artifact(PREFIX, folder)

    url = store.link(f"{PREFIX}config.json", 60, "config.json")

    assert url.startswith(f"{proxy.url}/")
    assert httpx.get(url).content == b"{}"
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(("name", "wrong"), [("AWS_SECRET_ACCESS_KEY", "not-the-secret"), ("AWS_ACCESS_KEY_ID", "AKNOBODY")])
def test_wrong_credentials_are_named_by_their_setting_and_never_shown(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
):
    monkeypatch.setenv(name, wrong)
    store = a_store(bucket)

    for call in (store.check, lambda: store.put_artifact(PREFIX, folder), lambda: store.list()):
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert name in caught.value.message
        assert caught.value.retryable
        for secret in (wrong, bucket.secret_key, bucket.access_key):
            assert secret not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_no_credentials_are_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_EC2_METADATA_DISABLED", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "true" if "METADATA" in name else "/nonexistent")

    with pytest.raises(StorageUnavailable, match="AWS_ACCESS_KEY_ID"):
        a_store(bucket).check()


def test_a_bucket_that_is_not_there_is_not_an_object_that_is_not_there(bucket: Bucket):
    with pytest.raises(StorageUnavailable, match="NoSuchBucket") as caught:
        a_store(bucket, storage_url="s3://no-such-bucket/x").list()
    assert not isinstance(caught.value, ObjectNotFound)


def test_a_server_that_is_gone_is_told_at_once_by_a_check(bucket: Bucket, proxy: BadProxy):
    store = a_store(bucket, s3_endpoint_url=proxy.url)
    proxy.close()

    with pytest.raises(StorageUnavailable, match="SLIMTRIM_S3_ENDPOINT_URL"):
        store.check()


def test_a_server_that_refuses_a_third_of_the_requests_still_gets_the_whole_artifact(
    store: S3Storage, far: S3Storage, proxy: BadProxy, folder: Path
):
    proxy.faults = Faults(refuse=1 / 3)
    manifest = far.put_artifact(PREFIX, folder)

    assert proxy.refused > 0
    assert store.list(PREFIX) == sorted(PREFIX + name for name in [*FILES, MANIFEST])
    for file in manifest["files"]:
        with store.open(PREFIX + file["path"]) as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == file["sha256"]


def test_a_server_that_refuses_everything_ends_in_a_named_error_and_shows_nothing(
    store: S3Storage, bucket: Bucket, proxy: BadProxy, folder: Path
):
    far = a_store(bucket, s3_endpoint_url=proxy.url)
    far._client = far._hasty_client  # one attempt: eight take a minute
    proxy.faults = Faults(refuse=1.0)

    with pytest.raises(StorageUnavailable, match="503") as caught:
        far.put_artifact(PREFIX, folder)

    assert caught.value.retryable
    assert store.list() == []


def test_a_byte_that_changes_on_the_way_up_is_refused(far: S3Storage, store: S3Storage, proxy: BadProxy, large: Path):
    proxy.faults = Faults(flip_up=100_000)

    with pytest.raises(StorageUnavailable, match="BadDigest"):
        far.put_file("blocks/x", large)

    assert store.list() == []


def test_a_byte_that_changes_on_the_way_down_is_noticed(far: S3Storage, proxy: BadProxy, folder: Path, tmp_path: Path):
    stored = far.put_file("blocks/x", folder / WEIGHTS)
    proxy.faults = Faults(flip_down=100_000, times=1)

    with pytest.raises(StorageUnavailable, match="did not come as it was stored"):
        far.get_file("blocks/x", tmp_path / "back", stored["sha256"])
    assert not (tmp_path / "back").exists()
    far.get_file("blocks/x", tmp_path / "back", stored["sha256"])


def test_a_download_goes_on_where_the_connection_broke(far: S3Storage, proxy: BadProxy, large: Path, tmp_path: Path):
    stored = far.put_file("blocks/x", large)
    proxy.requests.clear()
    proxy.bytes_down = 0
    proxy.faults = Faults(end_down=5 * MIB // 2, times=2)

    far.get_file("blocks/x", tmp_path / "back", stored["sha256"])

    assert len(proxy.requests) == 3
    assert proxy.bytes_down < 8 * MIB, "from the beginning each time it would be 2.5 + 2.5 + 6"


def test_a_stream_that_breaks_is_an_error_of_ours(far: S3Storage, proxy: BadProxy, large: Path):
    far.put_file("blocks/x", large)
    far.size("blocks/x")
    proxy.faults = Faults(cut_down=2 * MIB)

    with far.open("blocks/x") as stream, pytest.raises(StorageUnavailable):
        stream.read()


@pytest.mark.parametrize("whole", [10**9, MIB], ids=["whole", "parts"])
def test_a_known_object_is_copied_by_the_server(
    store: S3Storage, far: S3Storage, proxy: BadProxy, folder: Path, large: Path, whole: int
):
    stored = store.put_file("blocks/x", large)
    large.rename(folder / "a.safetensors")
    far.copied_whole_bytes = whole
    known = {"a.safetensors": KnownObject("blocks/x", stored["bytes"], stored["sha256"])}

    manifest = far.put_artifact(PREFIX, folder, known)

    rest = sum(map(len, FILES.values()))
    assert rest < proxy.bytes_up < rest + MIB, "none of the known bytes were sent"
    with store.open(f"{PREFIX}a.safetensors") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == stored["sha256"]
    assert manifest["bytes"] == rest + stored["bytes"]
    again = store.put_file(f"{PREFIX}a.safetensors", folder / "a.safetensors")
    assert again["sha256"] == stored["sha256"]


def test_equal_bytes_are_not_sent_twice(far: S3Storage, proxy: BadProxy, folder: Path):
    far.put_file("blocks/x", folder / WEIGHTS)
    sent = proxy.bytes_up
    far.put_file("blocks/x", folder / WEIGHTS)

    assert proxy.bytes_up - sent < 10_000


def test_more_objects_than_one_request_may_name_are_deleted(store: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.storage.s3._DELETED_AT_ONCE", 3)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(7):
        (many / f"{number}").write_bytes(b"x")
    store.put_artifact(PREFIX, many)

    store.delete(PREFIX)

    assert store.list() == []


def test_a_deletion_takes_the_manifest_first(store: S3Storage, far: S3Storage, proxy: BadProxy, folder: Path):
    store.put_artifact(PREFIX, folder)
    far.list()  # its connections are open
    far._client = far._hasty_client
    deletions = iter([False, True])
    sent = far._client.delete_objects

    def cut_short(**arguments: Any) -> Any:
        if next(deletions):
            proxy.faults = Faults(cut_up=0)
        return sent(**arguments)

    far._client.delete_objects = cut_short
    with pytest.raises(StorageUnavailable):
        far.delete(PREFIX)

    assert store.list(PREFIX) == sorted(PREFIX + name for name in FILES)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("QuotaExceeded", 403, Kind.FULL),
        ("XMinioStorageFull", 507, Kind.FULL),
        ("Whatever", 507, Kind.FULL),
        ("SlowDown", 503, Kind.SILENT),
        ("InternalError", 500, Kind.SILENT),
        ("AccessDenied", 403, Kind.REFUSED),
        ("404", 404, Kind.MISSING),
        ("PreconditionFailed", 412, Kind.CHANGED),
        ("BadDigest", 400, Kind.SILENT),
    ],
)
def test_what_a_server_answers_has_one_of_five_meanings(code: str, status: int, kind: Kind):
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code, "Message": "secret"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    failure = failure_of(ClientError(answer, "PutObject"))  # pyright: ignore[reportArgumentType]

    assert failure is not None
    assert failure.kind is kind
    assert "secret" not in failure.reason


def test_a_full_bucket_is_a_full_disk(store: S3Storage, folder: Path):
    from botocore.exceptions import ClientError

    def full(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "QuotaExceeded"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject")

    store._client.put_object = full  # no server here has a quota
    with pytest.raises(DiskFull, match="SLIMTRIM_STORAGE_URL"):
        store.put_artifact(PREFIX, folder)

    assert store.list() == []
