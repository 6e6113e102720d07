from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from compression.checkpoint import headers
from compression.checkpoint.headers import DTYPE_BITS, FolderFiles, is_plain, read_checkpoint
from compression.errors import (
    BrokenCheckpoint,
    ModelNotFound,
    RemoteCodeRequired,
    SlimtrimError,
    SourceNotAllowed,
    UnsafeCheckpoint,
)
from tests.compression.made_checkpoints import mixtral, write_model, write_raw, write_safetensors

CONFIG = {"model_type": "mixtral"}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


class MemoryFiles:
    """Files held in memory that remember what was read of them; ``claimed`` sizes may lie."""

    def __init__(self, files: dict[str, bytes], claimed: dict[str, int] | None = None) -> None:
        self.files = files
        self.claimed = claimed or {}
        self.reads: list[tuple[str, int, int]] = []

    def names(self) -> list[str]:
        return list(self.files)

    def size(self, name: str) -> int:
        return self.claimed.get(name, len(self.files[name]))

    def read(self, name: str, start: int, length: int) -> bytes:
        self.reads.append((name, start, length))
        return self.files[name][start : start + length]


def safetensors(header: object, data: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def single(header: object, data: int, config: object = CONFIG) -> MemoryFiles:
    return MemoryFiles({"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(header, data)})


def sharded(weight_map: object, shards: dict[str, bytes]) -> MemoryFiles:
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return MemoryFiles({"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": index, **shards})


TWO_SHARDS = {
    "one.safetensors": safetensors({"a": A}, 24),
    "two.safetensors": safetensors({"b": {**B, "data_offsets": [0, 8]}}, 8),
}


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
        "empty file": (MemoryFiles({"config.json": b"{}", "model.safetensors": b""}), "too short"),
        "seven bytes": (MemoryFiles({"config.json": b"{}", "model.safetensors": bytes(7)}), "too short"),
        "header past the end": (MemoryFiles({"config.json": b"{}", "model.safetensors": b"\xff" + bytes(9)}), "ends inside"),
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
        "a million dimensions": (single(a(shape=[1] * 10**6), 24), "shape"),
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
    files = single({"a": A}, 24, {**CONFIG, **config})

    with pytest.raises(RemoteCodeRequired, match="auto_map"):
        read_checkpoint(files)

    assert {name for name, _, _ in files.reads} == {"config.json"}


def test_an_empty_auto_map_asks_for_nothing():
    assert read_checkpoint(single({"a": A}, 24, {**CONFIG, "auto_map": {}})).tensors


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickled_weights_alone_are_unsafe_and_never_opened(suffix: str):
    files = MemoryFiles({"config.json": b"{}", f"model.{suffix}": b"pickle"})

    with pytest.raises(UnsafeCheckpoint, match=f"model.{suffix}"):
        read_checkpoint(files)

    assert {name for name, _, _ in files.reads} == {"config.json"}


def test_pickled_weights_beside_safetensors_are_ignored():
    files = single({"a": A}, 24)
    files.files["pytorch_model.bin"] = b"pickle"

    assert list(read_checkpoint(files).tensors) == ["a"]


def test_a_config_without_any_weights_is_broken():
    with pytest.raises(BrokenCheckpoint, match=r"neither model\.safetensors nor"):
        read_checkpoint(MemoryFiles({"config.json": b"{}", "other.safetensors": b""}))


def test_a_header_that_claims_to_be_huge_is_refused_after_eight_bytes():
    files = single({"a": A}, 24)
    files.files["model.safetensors"] = struct.pack("<Q", 10**14)
    files.claimed["model.safetensors"] = 10**15

    with pytest.raises(BrokenCheckpoint, match="at most 100000000"):
        read_checkpoint(files)

    assert files.reads[-1] == ("model.safetensors", 0, 8)


def test_the_headers_of_all_shards_share_one_limit():
    header = safetensors({"a": A}, 24)
    claims_60_mb = struct.pack("<Q", 60 * 10**6)
    places = {"a": "0.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    files = sharded(places, {"0.safetensors": header, "1.safetensors": claims_60_mb, "2.safetensors": claims_60_mb})
    files.claimed = {"1.safetensors": 10**9, "2.safetensors": 10**9}
    files.read = _spaces_for(files, "1.safetensors")  # type: ignore[method-assign]

    with pytest.raises(BrokenCheckpoint, match=r"'2\.safetensors' claims a header of 60000000 bytes"):
        read_checkpoint(files)


def _spaces_for(files: MemoryFiles, shard: str) -> Callable[[str, int, int], bytes]:
    """Let one shard hold the header {"b": ...} in 60 MB of spaces; its tensor fills what the file claims to be long."""
    data = 10**9 - 8 - 60 * 10**6
    header = json.dumps({"b": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}).encode().ljust(60 * 10**6)
    plain_read = MemoryFiles.read

    def read(name: str, start: int, length: int) -> bytes:
        return header if (name, start) == (shard, 8) else plain_read(files, name, start, length)

    return read


def test_a_header_of_nothing_but_brackets_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch):
    parsed: list[int] = []
    real_parse = json.loads
    monkeypatch.setattr(headers.json, "loads", lambda text, **how: parsed.append(len(text)) or real_parse(text, **how))
    files = single(b"[" + b"[]," * 5 * 10**6 + b"[]]", 0)

    with pytest.raises(BrokenCheckpoint, match="brackets"):
        read_checkpoint(files)

    assert max(parsed) < 1000


def test_tensors_are_counted_over_all_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(headers, "_MAX_TENSORS", 1)

    with pytest.raises(BrokenCheckpoint, match=r"2 tensors were found up to 'two\.safetensors'; at most 1"):
        read_checkpoint(sharded({"a": "one.safetensors", "b": "two.safetensors"}, TWO_SHARDS))


def test_a_file_that_gives_fewer_bytes_than_it_claims_is_broken():
    files = single({"a": A}, 24)
    files.claimed["config.json"] = 1000

    with pytest.raises(BrokenCheckpoint, match="of 1000 bytes"):
        read_checkpoint(files)


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
        with pytest.raises(SlimtrimError, match=name):
            FolderFiles(tmp_path).size(name)


def test_no_file_stays_open(tmp_path: Path):
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", (2,))})
    (tmp_path / "config.json").write_text("{}")
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
    (tmp_path / "config.json").write_text("{}")
    size = 2**40
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    write_raw(tmp_path / "model.safetensors", header, size)

    assert read_checkpoint(FolderFiles(tmp_path)).tensors["a"].bytes == size


numbers = st.one_of(st.integers(), st.integers(-2, 40), st.floats(), st.booleans())
json_values = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BITS)), json_values),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), json_values),
        "data_offsets": st.one_of(st.lists(st.integers(0, 64), min_size=2, max_size=2), json_values),
        "more": json_values,
    },
)
names = st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=5))
headers_of_any_kind = st.one_of(st.dictionaries(names, st.one_of(entries, json_values), max_size=4), json_values)
hostile = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def read_or_refuse(files: MemoryFiles) -> None:
    try:
        checkpoint = read_checkpoint(files)
    except SlimtrimError as refusal:
        json.dumps({"detail": refusal.message}).encode()
        refusal.message.encode()
        return
    for tensor in checkpoint.tensors.values():
        assert 0 <= tensor.start <= tensor.stop <= files.size(tensor.file)
    for file in {tensor.file for tensor in checkpoint.tensors.values()}:
        inside = [tensor for tensor in checkpoint.tensors.values() if tensor.file == file]
        assert sum(tensor.bytes for tensor in inside) == files.size(file) - min(tensor.start for tensor in inside)


@hostile
@given(content=st.binary(max_size=200))
def test_no_bytes_whatever_make_the_reader_fail_otherwise_than_by_name(content: bytes):
    read_or_refuse(MemoryFiles({"config.json": b"{}", "model.safetensors": content}))


@hostile
@given(header=headers_of_any_kind, data=st.integers(0, 64))
@example(header={"a": A}, data=24)
def test_no_header_whatever_makes_the_reader_fail_otherwise_than_by_name(header: object, data: int):
    read_or_refuse(single(header, data))


@hostile
@given(flips=st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), min_size=1, max_size=3), cut=st.integers(0, 40))
def test_no_damage_to_a_good_file_makes_the_reader_fail_otherwise_than_by_name(flips: list[tuple[int, int]], cut: int):
    content = bytearray(safetensors({"a": A, "b": B}, 32))
    for position, value in flips:
        content[position] = value

    read_or_refuse(MemoryFiles({"config.json": b"{}", "model.safetensors": bytes(content[: len(content) - cut])}))


@hostile
@given(
    weight_map=st.one_of(
        st.dictionaries(st.sampled_from("abc"), st.one_of(st.sampled_from(sorted(TWO_SHARDS)), st.text(max_size=12)), max_size=3),
        json_values,
    )
)
@example(weight_map={"a": "one.safetensors", "b": "two.safetensors"})
def test_no_index_whatever_makes_the_reader_fail_otherwise_than_by_name(weight_map: object):
    read_or_refuse(sharded(weight_map, TWO_SHARDS))


@hostile
@given(config=st.one_of(json_values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60)))
def test_no_config_whatever_makes_the_reader_fail_otherwise_than_by_name(config: bytes):
    read_or_refuse(MemoryFiles({"config.json": config, "model.safetensors": safetensors({"a": A}, 24)}))
