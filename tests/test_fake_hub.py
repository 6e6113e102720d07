"""The fake hub answers the real client as the hub does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fake_hub import FakeHub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository/below").mkdir(parents=True)
    (tmp_path / "repository/config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "repository/below/data.bin").write_bytes(bytes(range(256)) * 400)
    return tmp_path / "repository"


def _download(hub: FakeHub, name: str, file: str, cache: Path, **options: object) -> Path:
    return Path(hf_hub_download(name, file, endpoint=hub.url, cache_dir=cache, **options))


def test_a_model_is_described_with_its_commit_and_files(hub: FakeHub, folder: Path) -> None:
    commit = hub.add_model("some/model", folder)

    info = HfApi(endpoint=hub.url).model_info("some/model", files_metadata=True)

    assert info.sha == commit
    assert len(commit) == 40
    assert {file.rfilename: file.size for file in info.siblings or []} == {"config.json": 25, "below/data.bin": 102400}


def test_a_snapshot_is_the_folder(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    commit = hub.add_model("some/model", folder)

    copy = Path(snapshot_download("some/model", endpoint=hub.url, cache_dir=tmp_path / "cache"))

    assert copy.name == commit
    files = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert all((copy / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_a_changed_folder_added_again_moves_main_and_keeps_the_old_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text("{}")
    before, after = hub.add_model("some/model", folder), hub.add_model("some/model", tmp_path / "new")
    api = HfApi(endpoint=hub.url)

    assert before != after
    assert [api.model_info("some/model", revision=revision).sha for revision in (None, "main", before)] == [after, after, before]
    assert _download(hub, "some/model", "config.json", tmp_path / "cache", revision=before).read_text() != "{}"


def test_safetensors_headers_are_read_by_range(hub: FakeHub, tiny_model_factory, tmp_path: Path) -> None:
    hub.add_model("some/model", tiny_model_factory("mixtral", max_shard_size="1MB"))

    metadata = HfApi(endpoint=hub.url).get_safetensors_metadata("some/model")

    assert metadata.sharded
    assert "model.embed_tokens.weight" in metadata.weight_map
    assert any(request.endswith("bytes=0-100000") for request in hub.requests)
    assert not any(request.endswith(".safetensors") and request.startswith("GET") for request in hub.requests)


@pytest.mark.parametrize(
    ("asked", "start", "length"),
    [("bytes=10-19", 10, 10), ("bytes=-5", 102395, 5), ("bytes=102390-", 102390, 10), ("bytes=0-999999", 0, 102400)],
)
def test_a_range_is_answered_with_that_range(asked: str, start: int, length: int, hub: FakeHub, folder: Path) -> None:
    hub.add_model("some/model", folder)

    answer = httpx.get(f"{hub.url}/some/model/resolve/main/below/data.bin", headers={"Range": asked}, trust_env=False)

    assert answer.status_code == 206
    assert answer.content == (bytes(range(256)) * 400)[start : start + length]
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + length - 1}/102400"


def test_no_path_leads_out_of_the_folder(hub: FakeHub, folder: Path) -> None:
    (folder.parent / "outside").write_text("x")
    hub.add_model("some/model", folder)

    answer = httpx.get(f"{hub.url}/some/model/resolve/main/%2e%2e/outside", trust_env=False)

    assert "/some/model/resolve/main/../outside" in hub.requests[0]
    assert answer.status_code == 404


def test_what_is_missing_is_told_apart(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.add_model("some/model", folder)
    api = HfApi(endpoint=hub.url)

    with pytest.raises(RepositoryNotFoundError):
        api.model_info("some/other")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("some/model")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("some/model", revision="v9")
    with pytest.raises(EntryNotFoundError):
        _download(hub, "some/model", "absent.json", tmp_path / "cache")


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_wrong", 403)])
def test_a_gated_model_shows_itself_and_keeps_its_files(
    token: str | bool, status: int, hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    hub.add_model("some/model", folder, gated_for="hf_right")

    assert HfApi(endpoint=hub.url, token=token).model_info("some/model").gated == "manual"
    with pytest.raises(GatedRepoError) as caught:
        _download(hub, "some/model", "config.json", tmp_path / "cache", token=token)
    assert caught.value.response.status_code == status
    assert _download(hub, "some/model", "config.json", tmp_path / "cache", token="hf_right").is_file()


def test_a_download_cut_short_breaks_off_once(hub: FakeHub, folder: Path) -> None:
    hub.add_model("some/model", folder)
    hub.cut_next("data.bin", after=1000)
    url = f"{hub.url}/some/model/resolve/main/below/data.bin"

    with pytest.raises(httpx.RemoteProtocolError, match="received 1000 bytes, expected 102400"):
        httpx.get(url, trust_env=False)
    assert len(httpx.get(url, trust_env=False).content) == 102400


def test_the_real_client_mends_a_cut_download(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.add_model("some/model", folder)
    hub.cut_next("data.bin", after=1000)

    copy = _download(hub, "some/model", "below/data.bin", tmp_path / "cache")

    assert copy.read_bytes() == (folder / "below/data.bin").read_bytes()
    assert len([request for request in hub.requests if request.startswith("GET") and "data.bin" in request]) == 2


def test_a_planned_status_is_answered_as_often_as_planned(hub: FakeHub, folder: Path) -> None:
    hub.add_model("some/model", folder)
    hub.answer_next("/some/model", status=500, times=2)
    api = HfApi(endpoint=hub.url)

    for _ in range(2):
        with pytest.raises(HfHubHTTPError):
            api.model_info("some/model")

    assert api.model_info("some/model").id == "some/model"


def test_after_the_block_nobody_answers(folder: Path) -> None:
    with FakeHub() as hub:
        hub.add_model("some/model", folder)

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{hub.url}/api/models/some/model", trust_env=False)


def test_a_fresh_process_is_kept_from_this_machines_tokens_and_caches(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")

    environment = hub.environment(tmp_path)

    assert environment["HF_ENDPOINT"] == hub.url
    assert environment["HF_HOME"] == str(tmp_path)
    assert not {"HF_TOKEN", "HF_HUB_CACHE"} & environment.keys()
