"""The writer: what it was given lies on the disk, or it says so, and computing never waits longer than it must."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from compression.checkpoint import writer as writing
from compression.checkpoint.writer import Writer, shard_name
from compression.errors import DiskFull, VerificationFailed

CONFIG = {"model_type": "mixtral", "num_hidden_layers": 3}
OUTSIDE = {"model.embed_tokens.weight": torch.arange(12.0).view(3, 4)}


@pytest.fixture
def writer(tmp_path):
    made = Writer(tmp_path / "out", CONFIG)
    yield made
    made._writing = None  # what a test left unanswered
    made.close()


def block(index):
    prefix = f"model.layers.{index}"
    return {
        f"{prefix}.a.weight": torch.full((2, 3), float(index), dtype=torch.bfloat16).mT,  # not contiguous
        f"{prefix}.b.weight": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
        f"{prefix}.b.weight_packed": torch.arange(4, dtype=torch.int32).view(2, 2),
    }


def test_every_shard_holds_what_was_given_and_the_index_finds_it(writer, tmp_path):
    given = [OUTSIDE, *(block(index) for index in range(3))]
    (tmp_path / "source").mkdir()

    writer.outside(given[0])
    for index in range(3):
        writer.block(index, given[index + 1])
    writer.finish(tmp_path / "source")

    index = json.loads((writer.folder / "model.safetensors.index.json").read_text())
    for shard, tensors in enumerate(given):
        found = load_file(writer.folder / shard_name(shard, 4))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].float(), tensor.float())
            assert index["weight_map"][name] == shard_name(shard, 4)
    total = sum(tensor.nbytes for tensors in given for tensor in tensors.values())
    assert index["metadata"]["total_size"] == writer.bytes == total


def test_a_nan_is_written_as_it_is(writer):
    tensors = {"model.norm.weight": torch.tensor([1.0, torch.nan, -0.0])}

    writer.outside(tensors)
    writer.close()

    found = load_file(writer.folder / shard_name(0, 4))["model.norm.weight"]
    assert torch.equal(found.view(torch.int32), tensors["model.norm.weight"].view(torch.int32))


def test_computing_goes_on_while_a_shard_is_written_and_one_at_most_waits(writer, monkeypatch):
    may_write, original = threading.Event(), writing.save_file

    def slow(tensors, path, metadata):
        assert may_write.wait(30)
        original(tensors, path, metadata)

    monkeypatch.setattr(writing, "save_file", slow)
    second = threading.Thread(target=lambda: writer.block(0, block(0)))

    writer.outside(OUTSIDE)  # comes back although nothing is written yet
    assert not (writer.folder / shard_name(0, 4)).exists()
    second.start()
    second.join(0.2)
    assert second.is_alive()  # waits for the shard before
    may_write.set()
    second.join(30)
    writer.close()

    assert load_file(writer.folder / shard_name(1, 4)).keys() == block(0).keys()


def twisted(tensors):
    """One bit of one tensor is another, as on a disk that is not to be trusted."""
    name = next(iter(tensors))
    wrong = tensors[name].contiguous().clone()
    wrong.flatten().view(torch.uint8)[0] ^= 1
    return {**tensors, name: wrong}


@pytest.mark.parametrize("damage", [twisted, lambda tensors: dict(list(tensors.items())[1:])], ids=["a bit", "a tensor"])
def test_a_file_that_does_not_give_back_its_bytes_is_named(writer, monkeypatch, damage):
    original = writing.save_file
    monkeypatch.setattr(writing, "save_file", lambda tensors, path, metadata: original(damage(tensors), path, metadata))

    writer.block(1, block(1))

    with pytest.raises(VerificationFailed, match=rf"{shard_name(2, 4)} does not hold .* model\.layers\.1\.a\.weight"):
        writer.block(2, block(2))


FULL = {
    "by number": OSError(errno.ENOSPC, "full"),
    "in words": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


def failing(error):
    def save(*_):
        raise error

    return save


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("call", ["block", "finish", "close"])
def test_a_full_disk_is_reported_at_the_next_call_with_the_files_name(writer, monkeypatch, tmp_path, error, call):
    monkeypatch.setattr(writing, "save_file", failing(error))
    calls = {"block": lambda: writer.block(1, block(1)), "finish": lambda: writer.finish(tmp_path), "close": writer.close}

    writer.block(0, block(0))

    with pytest.raises(DiskFull, match=shard_name(1, 4)):
        calls[call]()
    assert not (writer.folder / "model.safetensors.index.json").exists()


def test_another_error_of_the_disk_comes_as_it_is(writer, monkeypatch):
    monkeypatch.setattr(writing, "save_file", failing(OSError(errno.EACCES, "not yours")))

    writer.outside(OUTSIDE)

    with pytest.raises(PermissionError, match="not yours"):
        writer.block(0, block(0))


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "broken")], ids=["after success", "after an error"])
def test_closing_ends_the_thread_that_writes(writer, monkeypatch, error):
    if error is not None:
        monkeypatch.setattr(writing, "save_file", failing(error))
    before = set(threading.enumerate())
    writer.outside(OUTSIDE)
    started = set(threading.enumerate()) - before

    if error is None:
        writer.close()
    else:
        with pytest.raises(OSError, match="broken"):
            writer.close()

    assert [thread.name.split("_")[0] for thread in started] == ["shards"]
    assert not any(thread.is_alive() for thread in started)
