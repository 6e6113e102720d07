"""Models and texts in a bucket: what may be read, and that a job computes on the bytes it was planned from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs.bucket_files
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.errors import (
    BrokenCheckpoint,
    DownloadFailed,
    ModelNotFound,
    SourceNotAllowed,
    SourceUnavailable,
    ValidationFailed,
)
from compression.request import Compression
from jobs.bucket_files import BucketFiles, Place, SourceChanged, parse_place, require_allowed
from jobs.settings import Settings
from jobs.sources import check_text_sources, fetch, fetch_texts, read_checkpoint_of
from tests.api.checkpoints import write_sharded
from tests.bad_proxy import Faults, a_bad_proxy
from tests.servers import Bucket

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as publishers upload it."""
    folder = write_sharded(tmp_path / "published")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "deeper").mkdir()
    (folder / "deeper/params.json").write_text("{}")
    return folder


@pytest.fixture
def put(bucket: Bucket) -> Callable[[str, bytes], None]:
    """Write an object below the test's prefix."""
    client = bucket.client()

    def putting(key: str, content: bytes) -> None:
        client.put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/{key}", Body=content)

    return putting


@pytest.fixture
def url(bucket: Bucket, model: Path, put: Callable[[str, bytes], None]) -> str:
    """The same model in a bucket."""
    for path in model.rglob("*"):
        if path.is_file():
            put(f"model/{path.relative_to(model)}", path.read_bytes())
    return f"s3://{bucket.name}/{bucket.prefix}/model"


@pytest.fixture
def settings(bucket: Bucket, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", model_buckets=(bucket.name,), s3_endpoint_url=bucket.endpoint)


def test_headers_are_those_of_the_same_files_in_a_folder(url: str, model: Path, settings: Settings):
    checkpoint, revision = read_checkpoint_of(url, "main", settings)
    local = read_checkpoint(FolderFiles(model))

    assert (checkpoint.config, checkpoint.tensors) == (local.config, local.tensors)
    assert re.fullmatch("[0-9a-f]{64}", revision or "")


def test_only_what_a_run_needs_is_fetched_and_byte_for_byte(url: str, model: Path, settings: Settings, tmp_path: Path):
    _, revision = read_checkpoint_of(url, None, settings)

    folder = fetch(f"{url}/", revision, tmp_path / "fetched", settings)

    fetched = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}
    wanted = [path.name for path in model.iterdir() if path.suffix in (".json", ".safetensors")]
    assert fetched == {name: (model / name).read_bytes() for name in wanted}


def test_any_piece_of_a_file_can_be_read(
    bucket: Bucket, url: str, model: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs.bucket_files, "_HEAD", 1000)
    files = BucketFiles.open(parse_place(url, "/model"), settings)
    content = (model / SHARD).read_bytes()
    size = len(content)

    assert files.size(SHARD) == size
    for start, length in ((0, 8), (990, 20), (1000, 5), (size - 3, 10), (size, 1), (0, size + 5), (5, 0)):
        assert files.read(SHARD, start, length) == content[start : start + length]
    with pytest.raises(BrokenCheckpoint):
        files.read("nothing.json", 0, 1)


def test_the_revision_is_that_of_what_a_run_needs_alone(url: str, put: Callable[[str, bytes], None], settings: Settings):
    def revision() -> str | None:
        return read_checkpoint_of(url, None, settings)[1]

    first = revision()
    put("model/README.md", b"other words")
    put("model/deeper/more.json", b"{}")

    assert revision() == first
    put("model/tokenizer.json", b"[]")
    second = revision()
    put("model/added.json", b"{}")
    assert len({first, second, revision()}) == 3


def test_files_that_changed_between_plan_and_fetch_end_the_job_for_good(
    url: str, put: Callable[[str, bytes], None], settings: Settings, tmp_path: Path
):
    _, revision = read_checkpoint_of(url, None, settings)
    put("model/tokenizer.json", b"[]")

    with pytest.raises(DownloadFailed, match="planned from") as caught:
        fetch(url, revision, tmp_path / "fetched", settings)

    assert not caught.value.retryable
    assert caught.value.code == "download_failed"
    assert not (tmp_path / "fetched").exists()
    with pytest.raises(ModelNotFound) as refused:
        read_checkpoint_of(url, revision, settings)
    assert refused.value.pointer == "/revision"


@pytest.mark.parametrize("change", ["write", "remove"])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    bucket: Bucket, url: str, put: Callable[[str, bytes], None], settings: Settings, tmp_path: Path, change: str
):
    files = BucketFiles.open(parse_place(url, "/model"), settings)
    if change == "write":
        put(f"model/{SHARD}", bytes(files.size(SHARD)))
    else:
        bucket.client().delete_object(Bucket=bucket.name, Key=f"{bucket.prefix}/model/{SHARD}")

    with pytest.raises(SourceUnavailable, match="while it was read"):
        files.read(SHARD, 0, 8)
    with pytest.raises(SourceUnavailable, match="while it was read"):
        files.save(SHARD, tmp_path)


def test_a_change_in_the_middle_of_a_fetch_ends_the_job_for_good(
    url: str, put: Callable[[str, bytes], None], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_all = BucketFiles.save_all

    def too_late(self: BucketFiles, destination: Path) -> None:
        put(f"model/{SHARD}", b"other bytes")
        save_all(self, destination)

    monkeypatch.setattr(BucketFiles, "save_all", too_late)
    with pytest.raises(SourceChanged):
        fetch(url, None, tmp_path / "fetched", settings)


def test_a_connection_that_breaks_during_a_fetch_is_continued(
    bucket: Bucket, url: str, model: Path, settings: Settings, tmp_path: Path
):
    largest = max(path.stat().st_size for path in model.glob("*.safetensors"))
    with a_bad_proxy(bucket.port, http=True) as proxy:
        far = settings.model_copy(update={"s3_endpoint_url": proxy.url})
        proxy.faults = Faults(cut_down=largest * 2 // 3)
        folder = fetch(url, None, tmp_path / "fetched", far)

    assert (folder / SHARD).read_bytes() == (model / SHARD).read_bytes()


def test_a_server_that_does_not_answer_is_named_and_may_answer_later(
    bucket: Bucket, url: str, settings: Settings, tmp_path: Path
):
    with a_bad_proxy(bucket.port) as proxy:
        gone = settings.model_copy(update={"s3_endpoint_url": proxy.url})

    with pytest.raises(SourceUnavailable) as caught:
        read_checkpoint_of(url, None, gone)
    assert caught.value.retryable


def test_a_prefix_without_anything_is_no_model(bucket: Bucket, settings: Settings):
    with pytest.raises(ModelNotFound):
        read_checkpoint_of(f"s3://{bucket.name}/{bucket.prefix}/nothing", None, settings)
    with pytest.raises(ModelNotFound):
        read_checkpoint_of("s3://no-such-bucket/x", None, settings.model_copy(update={"model_buckets": ("no-such-bucket",)}))


def test_wrong_credentials_are_a_source_that_may_not_be_read(url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")

    with pytest.raises(SourceNotAllowed, match="AWS_SECRET_ACCESS_KEY") as caught:
        read_checkpoint_of(url, None, settings)
    assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize("revision", ["v1.0", "0" * 63, "../main"])
def test_a_bucket_has_no_branches(url: str, settings: Settings, revision: str):
    with pytest.raises(ValidationFailed) as caught:
        read_checkpoint_of(url, revision, settings)
    assert caught.value.pointer == "/revision"


ALLOWED = ("models", "shared/team/a", "s3://spelt-out/x/")


def checked(url: str, allowed: tuple[str, ...] = ALLOWED) -> Place:
    place = parse_place(url, "/model")
    require_allowed(place, Settings(model_buckets=allowed), "/model")
    return place


@pytest.mark.parametrize(
    "url", ["s3://models", "s3://models/", "s3://models/a/b", "s3://shared/team/a", "s3://shared/team/a/b", "s3://spelt-out/x/y"]
)
def test_what_lies_below_an_entry_may_be_read(url: str):
    assert checked(url).url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "s3://models-evil/a", "s3://model/a", "s3://modelsevil", "s3://shared", "s3://shared/team", "s3://shared/team/ab",
        "s3://shared/team/a-b/c", "s3://shared/team/b", "s3://shared/team/a/../b", "s3://shared/team/b/../a/x", "s3://models/..",
        "s3://models/../shared/x", "s3://models//a", "s3://models/a//b", "s3://models/a//", "s3://models/./a", "s3://models/a/.",
        "s3://shared//team/a", "s3://shared/team%2fa/x", "s3://shared/team/%61",
    ],
)  # fmt: skip
def test_nothing_else_may_be_read_however_it_is_spelt(url: str):
    with pytest.raises(SourceNotAllowed) as caught:
        checked(url)
    assert caught.value.pointer == "/model"


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///a",
        "s3://UPPER/a",
        "s3://a",
        "s3://user@models/a",
        "s3://models:80/a",
        "s3://models/a\nb",
        "s3://models\\a/b",
    ],
)
def test_what_is_no_bucket_is_refused(url: str):
    with pytest.raises(ValidationFailed):
        checked(url)


def test_without_entries_no_bucket_is_read_and_the_setting_is_named(bucket: Bucket, url: str, tmp_path: Path, settings: Settings):
    closed = settings.model_copy(update={"model_buckets": ()})
    for read in (lambda: read_checkpoint_of(url, None, closed), lambda: fetch(url, None, tmp_path / "x", closed)):
        with pytest.raises(SourceNotAllowed, match="SLIMTRIM_MODEL_BUCKETS"):
            read()
    with pytest.raises(SourceNotAllowed, match="SLIMTRIM_MODEL_BUCKETS"):
        check_text_sources(asks(calibration={"source": f"{url}/tokenizer.json"}), closed)


def test_the_names_in_a_bucket_lead_nowhere():
    place = parse_place("s3://bucket/model", "/model")
    listed = {name: (1, '"e"') for name in ("a.json", "..", "b\\c.json", "d\x00.json", "e\nf.json")}
    items = [{"Key": f"{place.key}/{name}", "Size": size, "ETag": etag} for name, (size, etag) in listed.items()]

    class Pages:
        def get_paginator(self, _: str) -> Pages:
            return self

        def paginate(self, **_: Any) -> list[dict[str, Any]]:
            return [{"Contents": items}]

    assert BucketFiles.open(place, Settings(), client=Pages()).names() == ["a.json"]


def asks(**members: Any) -> Compression:
    return Compression.model_validate({"model": "a/b", "recipe": {"steps": [{"step": "analyze"}]}, **members})


def test_texts_are_checked_and_fetched(bucket: Bucket, put: Callable[[str, bytes], None], settings: Settings, tmp_path: Path):
    below = f"s3://{bucket.name}/{bucket.prefix}"
    put("a/text.jsonl", b'{"text": "a"}\n')
    put("b/text.jsonl", b'{"text": "b"}\n')
    domains = [{"source": f"{below}/a/text.jsonl"}, {"source": "default"}, {"source": f"{below}/b/text.jsonl"}]
    request = asks(calibration={"source": domains}, evaluation={"perplexity": {"source": f"{below}/a/text.jsonl"}})

    check_text_sources(request, settings)
    copies = fetch_texts(request, tmp_path / "texts", settings)

    assert {source: copy.read_bytes() for source, copy in copies.items()} == {
        f"{below}/a/text.jsonl": b'{"text": "a"}\n', f"{below}/b/text.jsonl": b'{"text": "b"}\n',
    }  # fmt: skip
    assert {copy.name for copy in copies.values()} == {"text.jsonl"}


@pytest.mark.parametrize(("key", "error"), [("/nothing.txt", ValidationFailed), ("/../x.txt", SourceNotAllowed)])
def test_a_text_that_is_not_there_or_not_allowed_is_pointed_at(
    bucket: Bucket, settings: Settings, key: str, error: type[Exception]
):
    source = f"s3://{bucket.name}/{bucket.prefix}{key}"
    with pytest.raises(error) as caught:
        check_text_sources(asks(calibration={"source": [{"source": "default"}, {"source": source}]}), settings)
    assert caught.value.pointer == "/calibration/source/1/source"  # pyright: ignore
    with pytest.raises((ValidationFailed, SourceNotAllowed)):
        check_text_sources(asks(evaluation={"perplexity": {"source": "s3://other-bucket/x.txt"}}), settings)


def test_a_bucket_alone_is_no_text(bucket: Bucket, settings: Settings):
    with pytest.raises(ValidationFailed, match="name an object"):
        check_text_sources(asks(calibration={"source": f"s3://{bucket.name}"}), settings)


def test_a_model_may_lie_at_the_root_of_a_bucket(bucket: Bucket, model: Path, settings: Settings, tmp_path: Path):
    client, root = bucket.client(), replace(bucket, name=f"{bucket.name}-root")
    client.create_bucket(Bucket=root.name)
    for path in model.glob("*.*"):
        client.put_object(Bucket=root.name, Key=path.name, Body=path.read_bytes())
    allowed = settings.model_copy(update={"model_buckets": (root.name,)})

    _, revision = read_checkpoint_of(f"s3://{root.name}", None, allowed)

    assert (fetch(f"s3://{root.name}", revision, tmp_path / "x", allowed) / SHARD).is_file()
