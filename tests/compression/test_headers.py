from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from compression.checkpoint.headers import DTYPE_BITS, FolderFiles, read_checkpoint
from compression.errors import (
    BrokenCheckpoint,
    ModelNotFound,
    RemoteCodeRequired,
    UnsafeCheckpoint,
)
from tests.compression.made_checkpoints import CONFIG, TWO_SHARDS, A, B, MemoryFiles, safetensors, sharded, single


def test_offsets_dtypes_and_shapes_are_those_that_the_safetensors_library_wrote(tmp_path: Path):
    arrays = {
        "x": np.arange(6, dtype=np.float16).reshape(2, 3),
        "y.z": np.array(7, dtype=np.int64),
        "none": np.zeros((0, 5), np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    tensors = read_checkpoint(FolderFiles(tmp_path)).tensors

    content = (tmp_path / "model.safetensors").read_bytes()
    with safe_open(tmp_path / "model.safetensors", "np") as library:
        assert set(tensors) == set(library.keys())
        for name, tensor in tensors.items():
            assert content[tensor.start : tensor.stop] == library.get_tensor(name).tobytes()
            assert tensor.shape == library.get_tensor(name).shape
            assert tensor.dtype == library.get_slice(name).get_dtype()


def test_of_a_model_only_config_and_headers_are_read():
    header = json.dumps({"a": A, "b": B}).encode()
    files = single(header, 32)

    read_checkpoint(files)

    assert files.reads == [
        ("config.json", 0, len(files.files["config.json"])),
        ("model.safetensors", 0, 8),
        ("model.safetensors", 8, len(header)),
    ]


def test_an_index_joins_the_shards_and_each_tensor_knows_its_file():
    files = sharded({"a": "one.safetensors", "b": "two.safetensors"}, TWO_SHARDS)

    tensors = read_checkpoint(files).tensors

    assert {name: (tensor.file, tensor.bytes) for name, tensor in tensors.items()} == {
        "a": ("one.safetensors", 24),
        "b": ("two.safetensors", 8),
    }


def test_a_single_file_wins_over_an_index_as_in_stock_loaders():
    files = sharded({"a": "one.safetensors"}, TWO_SHARDS)
    files.files["model.safetensors"] = safetensors({"only": A}, 24)

    assert list(read_checkpoint(files).tensors) == ["only"]


def test_a_tensor_that_the_index_forgot_is_kept_as_stock_loaders_keep_it():
    files = sharded({"a": "one.safetensors"}, {"one.safetensors": safetensors({"a": A, "b": B}, 32)})

    assert set(read_checkpoint(files).tensors) == {"a", "b"}


def test_spaces_after_the_header_and_metadata_in_it_are_part_of_the_format():
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": A}).encode() + b"   "

    assert list(read_checkpoint(single(header, 24)).tensors) == ["a"]


def test_every_dtype_of_the_format_is_measured_in_bits():
    header = {"half a byte each": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}

    assert read_checkpoint(single(header, 3)).tensors["half a byte each"].bytes == 3
    assert DTYPE_BITS["BF16"] == 16


def refusals_of_the_header() -> dict[str, tuple[MemoryFiles, str]]:
    """name of the fault -> files that have it, and a word that the message must contain."""

    def a(**changes: object) -> dict[str, object]:
        return {"a": {**A, **changes}}

    hole = {"a": A, "b": {**B, "data_offsets": [26, 34]}}
    overlap = {"a": A, "b": {**B, "data_offsets": [20, 28]}}
    repeated = b'{"a": ' + json.dumps(A).encode() + b', "a": ' + json.dumps(A).encode() + b"}"
    return {
        "empty file": (MemoryFiles({"config.json": b'{"model_type": "mixtral"}', "model.safetensors": b""}), "too short"),
        "seven bytes": (MemoryFiles({"config.json": b'{"model_type": "mixtral"}', "model.safetensors": bytes(7)}), "too short"),
        "header past the end": (
            MemoryFiles({"config.json": b'{"model_type": "mixtral"}', "model.safetensors": b"\xff" + bytes(9)}),
            "ends inside",
        ),
        "not JSON": (single(b"{nonsense", 0), "JSON"),
        "not UTF-8": (single(b'{"\xff": 1}', 0), "JSON"),
        "a list": (single([], 0), "object"),
        "deep": (single(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 0), "JSON"),
        "number of 5000 digits": (single(b'{"a":' + b"9" * 5000 + b"}", 0), "JSON"),
        "repeated name": (single(repeated, 24), "'a' appears twice"),
        "unnamed tensor": (single({"": A}, 24), "printable"),
        "name with a line break": (single({"a\nb": A}, 24), "printable"),
        "lone surrogate": (single({"\ud800": A}, 24), "printable"),
        "very long name": (single({"a" * 600: A}, 24), "printable"),
        "entry is a number": (single({"a": 3}, 0), "'a'"),
        "no dtype": (single({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4), "dtype"),
        "unknown dtype": (single(a(dtype="F99"), 24), "F99"),
        "dtype is a list": (single(a(dtype=["F32"]), 24), "dtype"),
        "negative size": (single(a(shape=[-2, -3]), 24), "shape"),
        "size is a fraction": (single(a(shape=[2.0, 3]), 24), "shape"),
        "size is true": (single(a(shape=[True, 6]), 24), "shape"),
        "huge size": (single(a(shape=[2**70, 0]), 24), "shape"),
        "many dimensions": (single(a(shape=[1] * 50_000), 24), "shape"),
        "three offsets": (single(a(data_offsets=[0, 24, 24]), 24), "data_offsets"),
        "offsets reversed": (single(a(data_offsets=[24, 0]), 24), "cannot fill"),
        "shape and bytes disagree": (single(a(shape=[2, 4]), 24), "cannot fill"),
        "bytes too many for the shape": (single(a(shape=[2, 2]), 24), "cannot fill"),
        "product overflows 64 bits": (single(a(shape=[2**62, 2**62]), 24), "cannot fill"),
        "half bytes": (single({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1), "cannot fill"),
        "hole": (single(hole, 34), "'b' in 'model.safetensors' leaves a hole"),
        "hole at the start": (single(a(data_offsets=[8, 32]), 32), "hole"),
        "overlap": (single(overlap, 28), "'b' in 'model.safetensors' overlaps"),
        "truncated": (single({"a": A, "b": B}, 31), "truncated"),
        "bytes left over": (single({"a": A}, 25), "end at"),
    }


@pytest.mark.parametrize("fault", refusals_of_the_header())
def test_a_broken_header_is_refused_by_name(fault: str):
    files, word = refusals_of_the_header()[fault]

    with pytest.raises(BrokenCheckpoint) as refusal:
        read_checkpoint(files)

    assert word in refusal.value.message
    assert len(refusal.value.message) < 2000


def refusals_of_the_index() -> dict[str, tuple[MemoryFiles, str]]:
    one = {"one.safetensors": safetensors({"a": A}, 24)}
    return {
        "no weight_map": (sharded(None, one), "weight_map"),
        "empty weight_map": (sharded({}, one), "weight_map"),
        "weight_map is a list": (sharded(["a"], one), "weight_map"),
        "missing shard": (
            sharded({"a": "one.safetensors", "b": "gone.safetensors"}, one),
            "'gone.safetensors', which is missing",
        ),
        "way up": (sharded({"a": "../one.safetensors"}, one), "plain"),
        "absolute": (sharded({"a": "/etc/one.safetensors"}, one), "plain"),
        "backslash": (sharded({"a": "..\\one.safetensors"}, one), "plain"),
        "sub-folder": (sharded({"a": "x/one.safetensors"}, one), "plain"),
        "zero byte": (sharded({"a": "one\0.safetensors"}, one), "plain"),
        "pickled shard": (sharded({"a": "pytorch_model.bin"}, one | {"pytorch_model.bin": b""}), "safetensors"),
        "file is a number": (sharded({"a": 1}, one), "plain"),
        "tensor is elsewhere": (sharded({"a": "two.safetensors"}, TWO_SHARDS), "does not hold it"),
        "shards swapped": (sharded({"a": "two.safetensors", "b": "one.safetensors"}, TWO_SHARDS), "does not hold it"),
        "tensor is nowhere": (sharded({"a": "one.safetensors", "c": "one.safetensors"}, one), "'c' in 'one.safetensors'"),
        "tensor in two shards": (
            sharded(
                {"a": "one.safetensors", "b": "two.safetensors"}, one | {"two.safetensors": safetensors({"a": A, "b": B}, 32)}
            ),
            "'a' is in 'one.safetensors' and again in 'two.safetensors'",
        ),
        "five thousand shards": (sharded({str(n): f"{n}.safetensors" for n in range(5000)}, one), "5000 files"),
    }


@pytest.mark.parametrize("fault", refusals_of_the_index())
def test_an_index_that_lies_is_refused_by_name(fault: str):
    files, word = refusals_of_the_index()[fault]

    with pytest.raises(BrokenCheckpoint) as refusal:
        read_checkpoint(files)

    assert word in refusal.value.message


BAD_CONFIGS = {
    "cut off": b"{",
    "list": b"[]",
    "null": b"null",
    "not UTF-8": b"\xff\xfe",
    "nested 50 deep": b'{"a": ' * 50 + b"1" + b"}" * 50,
    "nested 100000 deep": b"[" * 100_000,
    "repeated key": b'{"a": 1, "a": 2}',
    "5 MiB": b'{"a": "' + b"x" * 5 * 2**20 + b'"}',
}


@pytest.mark.parametrize("config", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_is_no_small_flat_object_is_broken(config: bytes):
    files = MemoryFiles({"config.json": config, "model.safetensors": safetensors({"a": A}, 24)})

    with pytest.raises(BrokenCheckpoint, match=r"config\.json"):
        read_checkpoint(files)


def test_without_config_there_is_no_model():
    with pytest.raises(ModelNotFound):
        read_checkpoint(MemoryFiles({"model.safetensors": safetensors({"a": A}, 24)}))


@pytest.mark.parametrize(
    "config", [{"auto_map": {"AutoModel": "code.Model"}}, {"text_config": {"auto_map": {"AutoModel": "code.Model"}}}]
)
def test_code_of_the_models_own_is_refused_wherever_config_asks_for_it(config: dict[str, Any]):
    files = single({"a": A}, 24, {"model_type": "own_moe", **config})

    with pytest.raises(RemoteCodeRequired, match="auto_map"):
        read_checkpoint(files)

    assert {name for name, _, _ in files.reads} == {"config.json"}


def test_code_that_a_supported_family_offers_besides_is_left_alone():
    """The published configs of deepseek and phi name such code; the stock classes open the same weights without it."""
    config = {**CONFIG, "model_type": "deepseek_v3", "auto_map": {"AutoModel": "code.Model"}}

    assert read_checkpoint(single({"a": A}, 24, config)).tensors


def test_an_empty_auto_map_asks_for_nothing():
    assert read_checkpoint(single({"a": A}, 24, {**CONFIG, "auto_map": {}})).tensors


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickled_weights_alone_are_unsafe_and_never_opened(suffix: str):
    files = MemoryFiles({"config.json": b'{"model_type": "mixtral"}', f"model.{suffix}": b"pickle"})

    with pytest.raises(UnsafeCheckpoint, match=f"model.{suffix}"):
        read_checkpoint(files)

    assert {name for name, _, _ in files.reads} == {"config.json"}


def test_pickled_weights_beside_safetensors_are_ignored():
    files = single({"a": A}, 24)
    files.files["pytorch_model.bin"] = b"pickle"

    assert list(read_checkpoint(files).tensors) == ["a"]


def test_a_config_without_any_weights_is_broken():
    with pytest.raises(BrokenCheckpoint, match=r"neither model\.safetensors nor"):
        read_checkpoint(MemoryFiles({"config.json": b'{"model_type": "mixtral"}', "other.safetensors": b""}))
