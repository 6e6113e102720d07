"""Where models come from: what may be read, what is read, and what is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs.hub
import jobs.sources
import tests.fake_hub
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.errors import (
    BrokenCheckpoint,
    DownloadFailed,
    GatedModel,
    ModelNotFound,
    RequestError,
    SourceNotAllowed,
    SourceUnavailable,
    ValidationFailed,
)
from compression.request import Compression
from jobs.bucket_files import Place
from jobs.settings import Settings
from jobs.sources import FolderSource, HubSource, check_text_sources, fetch, parse, read_checkpoint_of
from tests.api.checkpoints import CONFIG, mixtral_shapes, tensor_bytes, write_mixtral, write_sharded
from tests.fake_hub import FakeHub

TOKEN = "hf_abcdefgh"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "models").mkdir()
    (tmp_path / "more").mkdir()
    return Settings(data_dir=tmp_path / "data", model_roots=(tmp_path / "models", tmp_path / "more"), hf_token=None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_this_machine_that_must_not_leave_it")
        yield running


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder as publishers upload it: weights in shards, and much that must not be fetched."""
    folder = write_sharded(tmp_path / "repository")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(bytes(1000))
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    (folder / "README.md").write_text("# A model")
    return folder


@pytest.mark.parametrize("model", ["mistralai/Mixtral-8x7B-v0.1", "a/b", "Qwen/Qwen3-30B-A3B", "x_y.z/1.0"])
def test_owner_and_name_are_a_hub_repository(model: str):
    assert parse(model) == HubSource(model)


@pytest.mark.parametrize(
    "model",
    [
        "", "model", "a/b/c", "../b", "a/..", "a/b..c", "/a/b", "a b/c", "a/b@main", "-a/b", ".a/b", "a/b\n", "\u0430/b", "http://a/b",
        "hub:a/b", "file:/a/b", "file://host/a", "file://", "FILE:///a", "a/" + "b" * 97, "file:///a\x00b", "~/model", "./model",
    ],
)  # fmt: skip
def test_what_is_neither_repository_nor_path_is_refused(model: str):
    with pytest.raises(ValidationFailed) as caught:
        parse(model)
    assert caught.value.pointer == "/model"


@given(st.text(max_size=60))
def test_parsing_never_fails_with_anything_but_a_named_refusal(model: str):
    for text in (model, f"file:///{model}", f"a/{model}", f"s3://{model}"):
        with suppress(RequestError):
            assert isinstance(parse(text), HubSource | FolderSource | Place)


def test_a_folder_below_any_root_is_read_in_place(settings: Settings, tmp_path: Path):
    for root in ("models", "more"):
        folder = write_mixtral(tmp_path / root / "deep" / "mixtral")

        checkpoint, commit = read_checkpoint_of(f"file://{folder}", "main", settings)

        assert checkpoint.config == CONFIG
        assert set(checkpoint.tensors) == set(mixtral_shapes())
        assert commit is None
        assert fetch(f"file://{folder}", None, tmp_path / "never", settings) == folder
    assert not (tmp_path / "never").exists()


def test_nothing_in_a_path_is_decoded(settings: Settings, tmp_path: Path):
    folder = write_mixtral(tmp_path / "models" / "50%25 off")

    assert fetch(f"file://{folder}", None, tmp_path / "never", settings) == folder
    with pytest.raises(ModelNotFound):
        fetch(f"file://{tmp_path}/models/50% off", None, tmp_path / "never", settings)


def test_without_roots_no_folder_is_read_and_the_setting_is_named(tmp_path: Path):
    folder = write_mixtral(tmp_path / "models" / "m")

    with pytest.raises(SourceNotAllowed, match="SLIMTRIM_MODEL_ROOTS"):
        read_checkpoint_of(f"file://{folder}", "main", Settings(data_dir=tmp_path / "data"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "outside")


@pytest.mark.parametrize(
    "spelling",
    [
        "{tmp}/outside",
        "{tmp}/models/../outside",
        "{tmp}/models/x/../../outside",
        "{tmp}/models/link",
        "{tmp}/models/chain",
        "{tmp}/models/circle",
        "{tmp}/models-and-more",
        "{tmp}",
        "/",
        "/proc/self/cwd",
    ],
)
def test_no_way_leads_out_of_the_roots(settings: Settings, tmp_path: Path, outside: Path, spelling: str):
    (tmp_path / "models/link").symlink_to(outside)
    (tmp_path / "models/chain").symlink_to(tmp_path / "models/link")
    (tmp_path / "models/circle").symlink_to(tmp_path / "models/circle")
    write_mixtral(tmp_path / "models-and-more")
    model = f"file://{spelling.format(tmp=tmp_path)}"

    for call in (lambda: read_checkpoint_of(model, "main", settings), lambda: fetch(model, None, tmp_path / "x", settings)):
        with pytest.raises(SourceNotAllowed) as caught:
            call()
        assert caught.value.pointer == "/model"


def test_outside_the_roots_the_answer_does_not_say_what_exists(settings: Settings, outside: Path):
    answers: list[str] = []
    for folder in (outside, outside.with_name("nothing")):
        with pytest.raises(SourceNotAllowed) as caught:
            read_checkpoint_of(f"file://{folder}", "main", settings)
        answers.append(str(caught.value).replace(str(folder), "X"))

    assert answers[0] == answers[1]


def test_links_that_stay_below_the_root_are_followed(settings: Settings, tmp_path: Path):
    """So a hub cache can be a root: its snapshots are links into a folder beside them."""
    blobs, snapshot = write_mixtral(tmp_path / "models/cache/blobs"), tmp_path / "models/cache/snapshots/main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)

    checkpoint, _ = read_checkpoint_of(f"file://{snapshot}", "main", settings)

    assert len(checkpoint.tensors) == len(mixtral_shapes())


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_model_made_of_links_is_fetched_as_plain_files(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
):
    """A run opens nothing outside its folder, so what links lead to must come to it."""
    blobs, snapshot = write_mixtral(tmp_path / "models/cache/blobs"), tmp_path / "models/cache/snapshots/main"
    (blobs / "pytorch_model.bin").write_bytes(b"pickle")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    if not same_disk:
        monkeypatch.setattr(os, "link", refuse_links)

    fetched = fetch(f"file://{snapshot}", None, tmp_path / "x", settings)

    assert fetched == tmp_path / "x"
    assert {path.name for path in fetched.iterdir()} == {"config.json", "model.safetensors"}
    assert read_checkpoint(FolderFiles(fetched)) == read_checkpoint(FolderFiles(blobs))
    assert (fetched / "model.safetensors").read_bytes() == (blobs / "model.safetensors").read_bytes()


def refuse_links(*_names: Any, **_how: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_a_link_out_of_the_root_is_refused(settings: Settings, tmp_path: Path, outside: Path, name: str):
    folder = write_mixtral(tmp_path / "models/m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / "model.safetensors")

    with pytest.raises(SourceNotAllowed):
        fetch(f"file://{folder}", None, tmp_path / "x", settings)


def test_what_became_a_link_out_of_the_root_between_plan_and_fetch_is_not_fetched(
    settings: Settings, tmp_path: Path, outside: Path
):
    model = write_mixtral(tmp_path / "models/turned")
    read_checkpoint_of(f"file://{model}", None, settings)
    (model / "notes.json").symlink_to(outside / "config.json")
    with pytest.raises(SourceNotAllowed, match=r"notes\.json"):
        fetch(f"file://{model}", None, tmp_path / "x", settings)

    model.rename(tmp_path / "models/before")
    model.symlink_to(outside)
    with pytest.raises(SourceNotAllowed):
        fetch(f"file://{model}", None, tmp_path / "x", settings)
    assert not (tmp_path / "x").exists()


def test_a_missing_folder_below_a_root_is_not_found(settings: Settings, tmp_path: Path):
    with pytest.raises(ModelNotFound):
        read_checkpoint_of(f"file://{tmp_path}/models/nothing", "main", settings)


def text_request(**members: Any) -> Compression:
    return Compression.model_validate({"model": "a/b", "recipe": {"steps": [{"step": "quantize"}]}, **members})


def test_text_below_a_root_may_be_read(settings: Settings, tmp_path: Path):
    (tmp_path / "models/text.jsonl").write_text("{}")
    source = {"source": f"file://{tmp_path}/models/text.jsonl"}

    check_text_sources(text_request(calibration=source, evaluation={"perplexity": source}), settings)
    check_text_sources(text_request(calibration={"source": [source, {"source": {"inline": ["x"]}}]}), settings)
    check_text_sources(text_request(calibration={"source": "hub:allenai/c4"}), settings)


@pytest.mark.parametrize(
    ("path", "error"),
    [("outside.txt", SourceNotAllowed), ("models/../outside.txt", SourceNotAllowed), ("models/link.txt", SourceNotAllowed),
     ("models/nothing.txt", ValidationFailed), ("models", ValidationFailed)],
)  # fmt: skip
def test_text_elsewhere_or_nowhere_is_pointed_at(settings: Settings, tmp_path: Path, path: str, error: type[RequestError]):
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "models/link.txt").symlink_to(tmp_path / "outside.txt")
    source = f"file://{tmp_path}/{path}"
    places = {
        "/calibration/source": {"calibration": {"source": source}},
        "/calibration/source/1/source": {"calibration": {"source": [{"source": "default"}, {"source": source}]}},
        "/evaluation/perplexity/source": {"evaluation": {"perplexity": {"source": source}}},
        "/evaluation/perplexity/source/0/source": {"evaluation": {"perplexity": {"source": [{"source": source}]}}},
        "/evaluation/generation/source": {"evaluation": {"generation": {"source": source}}},
    }

    for pointer, members in places.items():
        with pytest.raises(error) as caught:
            check_text_sources(text_request(**members), settings)
        assert caught.value.pointer == pointer


def test_a_branch_is_pinned_to_its_commit(settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path):
    main = hub.add_model("someone/moe", repository)
    other = hub.add_model("someone/moe", write_mixtral(tmp_path / "other", vocab_size=7), revision="v2")

    pinned = {revision: read_checkpoint_of("someone/moe", revision, settings) for revision in ("main", "v2", main)}

    assert {revision: commit for revision, (_, commit) in pinned.items()} == {"main": main, "v2": other, main: main}
    assert pinned["v2"][0].config["vocab_size"] == 7
    assert pinned["main"][0].config == pinned[main][0].config


def test_a_branch_that_moves_on_does_not_change_what_was_planned(
    settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path
):
    hub.add_model("someone/moe", repository)
    _, commit = read_checkpoint_of("someone/moe", "main", settings)
    hub.add_model("someone/moe", write_mixtral(tmp_path / "pushed", vocab_size=7))

    folder = fetch("someone/moe", commit, tmp_path / "fetched", settings)

    assert json.loads((folder / "config.json").read_text()) == CONFIG


def test_only_config_and_headers_are_read_from_the_hub(settings: Settings, hub: FakeHub, repository: Path):
    """Never a request for a file without a range, and of each file its beginning only."""
    hub.add_model("someone/moe", repository)
    checkpoint, _ = read_checkpoint_of("someone/moe", "main", settings)
    files = [line for line in hub.requests if "/resolve/" in line]
    ranges = [re.search(r"bytes=(\d+)-(\d+)$", line) for line in files]
    read = sum(int(match[2]) - int(match[1]) + 1 for match in ranges if match)

    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == mixtral_shapes()
    assert all(ranges)
    assert len(files) == 4, "config, index, and one request per shard"
    assert read <= 4 * 2**16 < tensor_bytes()
    assert not [line for line in files if line.split()[1].endswith((".bin", ".py", "consolidated.safetensors"))]


def test_a_header_longer_than_the_first_look_is_read_to_its_end(settings: Settings, hub: FakeHub, tmp_path: Path):
    folder = write_mixtral(tmp_path / "long")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": {"note": "x" * 200_000}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    hub.add_model("someone/moe", folder)

    checkpoint, _ = read_checkpoint_of("someone/moe", "main", settings)

    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == mixtral_shapes()
    assert checkpoint.tensors["model.embed_tokens.weight"].start == 8 + len(text)


def test_a_model_from_the_hub_is_the_same_as_from_its_folder(settings: Settings, hub: FakeHub, tmp_path: Path):
    folder = write_sharded(tmp_path / "models/m")
    hub.add_model("someone/moe", folder)

    assert read_checkpoint_of("someone/moe", "main", settings)[0] == read_checkpoint_of(f"file://{folder}", None, settings)[0]


def test_weights_configs_and_tokenizer_are_fetched_and_neither_code_nor_pickles(
    settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path
):
    commit = hub.add_model("someone/moe", repository)

    folder = fetch("someone/moe", commit, tmp_path / "fetched", settings)
    fetched = {path.name for path in folder.iterdir() if path.is_file()}

    assert fetched == {
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "tokenizer.json", "tokenizer.model", "chat_template.jinja",
    }  # fmt: skip
    for name in fetched:
        assert hashlib.sha256((folder / name).read_bytes()).digest() == hashlib.sha256((repository / name).read_bytes()).digest()
        assert not (folder / name).is_symlink()


def test_a_download_that_breaks_off_is_not_taken_for_whole(settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path):
    commit = hub.add_model("someone/moe", repository)
    name = "model-00001-of-00002.safetensors"
    hub.cut_next(name, after=1000)

    with suppress(DownloadFailed):  # the hub's client may go on by itself
        fetch("someone/moe", commit, tmp_path / "fetched", settings)
    folder = fetch("someone/moe", commit, tmp_path / "fetched", settings)

    assert (folder / name).read_bytes() == (repository / name).read_bytes()


def test_a_header_that_breaks_off_is_not_taken_for_whole(settings: Settings, hub: FakeHub, repository: Path):
    hub.add_model("someone/moe", repository)
    hub.cut_next("config.json", after=10)

    with pytest.raises(SourceUnavailable):
        read_checkpoint_of("someone/moe", "main", settings)


@pytest.mark.parametrize(
    ("model", "revision", "pointer"), [("no/body", "main", "/model"), ("someone/moe", "v9", "/revision")]
)  # fmt: skip
def test_what_the_hub_does_not_have_is_not_found(
    settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path, model: str, revision: str, pointer: str
):
    hub.add_model("someone/moe", repository)

    for call in (lambda: read_checkpoint_of(model, revision, settings), lambda: fetch(model, revision, tmp_path / "x", settings)):
        with pytest.raises(ModelNotFound) as caught:
            call()
        assert caught.value.pointer == pointer
        assert not caught.value.retryable


@pytest.mark.parametrize("revision", ["../main", "a b", "", "-x", "a\nb", "x" * 300])
def test_a_revision_that_no_hub_has_is_not_even_asked_for(settings: Settings, hub: FakeHub, revision: str):
    with pytest.raises(ValidationFailed) as caught:
        read_checkpoint_of("someone/moe", revision, settings)

    assert caught.value.pointer == "/revision"
    assert hub.requests == []


def test_a_gated_model_needs_the_operators_token_and_no_other(settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path):
    hub.add_model("someone/gated", repository, gated_for=TOKEN)
    wrong, right = (settings.model_copy(update={"hf_token": token}) for token in map(_secret, ("hf_another", TOKEN)))

    for refused in (settings, wrong):
        for call in (read_checkpoint_of, lambda model, revision, used: fetch(model, revision, tmp_path / "x", used)):
            with pytest.raises(GatedModel, match="SLIMTRIM_HF_TOKEN"):
                call("someone/gated", "main", refused)
    assert len(read_checkpoint_of("someone/gated", "main", right)[0].tensors) == len(mixtral_shapes())
    assert (fetch("someone/gated", "main", tmp_path / "y", right) / "config.json").is_file()


def _secret(value: str) -> Any:
    return Settings(hf_token=value).hf_token  # pyright: ignore[reportArgumentType]


def test_only_the_services_own_token_is_ever_sent(
    settings: Settings, hub: FakeHub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """HF_TOKEN, which is another account's, is in the environment all the while."""
    hub.add_model("someone/moe", repository)
    sent: set[str | None] = set()
    answer = tests.fake_hub._Handler._answer  # pyright: ignore[reportPrivateUsage]

    def noted(self: Any) -> None:
        sent.add(self.headers.get("Authorization"))
        answer(self)

    monkeypatch.setattr(tests.fake_hub._Handler, "_answer", noted)  # pyright: ignore[reportPrivateUsage]
    for used, expected in ((settings, None), (settings.model_copy(update={"hf_token": _secret(TOKEN)}), f"Bearer {TOKEN}")):
        sent.clear()
        read_checkpoint_of("someone/moe", "main", used)
        assert sent == {expected}
        sent.clear()
        fetch("someone/moe", "main", tmp_path / f"fetched-{expected is None}", used)
        assert sent == {expected}


def test_the_message_never_holds_the_token(settings: Settings, hub: FakeHub, repository: Path):
    hub.add_model("someone/gated", repository, gated_for="other")

    with pytest.raises(GatedModel) as caught:
        read_checkpoint_of("someone/gated", "main", settings.model_copy(update={"hf_token": _secret(TOKEN)}))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_unwell_may_be_asked_later(settings: Settings, hub: FakeHub, repository: Path, status: int):
    hub.add_model("someone/moe", repository)
    hub.answer_next("config.json", status=status, times=10)

    with pytest.raises(SourceUnavailable) as caught:
        read_checkpoint_of("someone/moe", "main", settings)
    assert caught.value.retryable


def test_a_hub_that_is_not_there_may_be_asked_later(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")

    with pytest.raises(SourceUnavailable) as caught:
        read_checkpoint_of("someone/moe", "main", settings)
    assert caught.value.retryable
    with pytest.raises(DownloadFailed) as failed:
        fetch("someone/moe", "main", tmp_path / "x", settings)
    assert failed.value.retryable


def test_a_file_that_the_hub_lists_and_does_not_have_makes_a_broken_checkpoint(
    settings: Settings, hub: FakeHub, repository: Path
):
    """The first request after the listing finds it gone."""
    hub.add_model("someone/moe", repository)
    files, _ = jobs.sources.open_files("someone/moe", "main", settings)
    (repository / "config.json").unlink()

    with pytest.raises(BrokenCheckpoint, match="someone/moe"):
        files.read("config.json", 0, 10)
    with pytest.raises(BrokenCheckpoint, match=r"nothing\.json"):
        files.size("nothing.json")


def test_a_hub_without_ranges_is_not_read_whole(
    settings: Settings, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A server may answer 200 with everything; no more is taken than was asked for."""
    folder = write_mixtral(tmp_path / "m")
    hub.add_model("someone/moe", folder)
    taken: list[int] = []
    take = jobs.hub._take  # pyright: ignore[reportPrivateUsage]

    def counted(response: Any, length: int) -> bytes:
        taken.append(len(data := take(response, length)))
        return data

    monkeypatch.setattr(jobs.hub, "_take", counted)
    monkeypatch.setattr("tests.fake_hub._RANGE", re.compile("never"))

    checkpoint, _ = read_checkpoint_of("someone/moe", "main", settings)

    assert len(checkpoint.tensors) == len(mixtral_shapes())
    assert max(taken) <= 2**16 < os.path.getsize(folder / "model.safetensors")


def test_a_folder_source_keeps_the_path_as_written():
    assert parse("file:///srv/a b") == FolderSource(Path("/srv/a b"))
