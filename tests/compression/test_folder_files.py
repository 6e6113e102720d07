from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compression.checkpoint.headers import FolderFiles, is_plain, read_checkpoint
from compression.errors import BrokenCheckpoint, ModelNotFound, SourceNotAllowed
from tests.compression.made_checkpoints import mixtral, write_model, write_raw, write_safetensors


def test_a_folder_reads_the_model_that_was_written_there(tmp_path: Path):
    config, tensors = mixtral(blocks=1)

    checkpoint = read_checkpoint(FolderFiles(write_model(tmp_path, config, tensors)))

    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == tensors
    assert checkpoint.config == config


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\nb", "x" * 600])
def test_only_plain_names_are_opened_in_a_folder(tmp_path: Path, name: str):
    assert not is_plain(name)

    with pytest.raises(SourceNotAllowed):
        FolderFiles(tmp_path).read(name, 0, 1)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_the_root_is_followed(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"12345")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")

    with pytest.raises(SourceNotAllowed, match="leads out"):
        FolderFiles(snapshot).size("config.json")

    assert FolderFiles(snapshot, root=tmp_path).read("config.json", 1, 3) == b"234"


def test_a_folder_that_is_itself_a_link_out_of_the_root_is_refused(tmp_path: Path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "model").symlink_to(tmp_path / "secret")

    with pytest.raises(SourceNotAllowed):
        FolderFiles(tmp_path / "root" / "model", root=tmp_path / "root").size("config.json")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")

    with pytest.raises(SourceNotAllowed, match="regular"):
        FolderFiles(tmp_path).size("config.json")


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path: Path):
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "circle").symlink_to("circle")

    for name in ("nowhere", "circle"):
        with pytest.raises(BrokenCheckpoint, match=name):
            FolderFiles(tmp_path).size(name)


def test_no_file_stays_open(tmp_path: Path):
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", (2,))})
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "folder").mkdir()
    before = len(os.listdir("/proc/self/fd"))

    read_checkpoint(FolderFiles(tmp_path))
    with pytest.raises(SourceNotAllowed):
        FolderFiles(tmp_path).size("folder")

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_not_there_is_no_model(tmp_path: Path):
    with pytest.raises(ModelNotFound) as refusal:
        FolderFiles(tmp_path / "gone").names()

    assert str(tmp_path) not in refusal.value.message


def test_a_sparse_file_of_a_terabyte_is_read_like_a_small_one(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    size = 2**40
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    write_raw(tmp_path / "model.safetensors", header, size)

    assert read_checkpoint(FolderFiles(tmp_path)).tensors["a"].bytes == size
