from __future__ import annotations

import json
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compression.checkpoint import headers
from compression.checkpoint.headers import DTYPE_BITS, read_checkpoint
from compression.errors import BrokenCheckpoint, SlimtrimError
from tests.compression.made_checkpoints import CONFIG, TWO_SHARDS, A, B, MemoryFiles, safetensors, sharded, single


def test_a_header_that_claims_to_be_huge_is_refused_after_eight_bytes():
    files = single({"a": A}, 24)
    files.files["model.safetensors"] = struct.pack("<Q", 10**14)
    files.claimed["model.safetensors"] = 10**15

    with pytest.raises(BrokenCheckpoint, match="at most 40000000"):
        read_checkpoint(files)

    assert files.reads[-1] == ("model.safetensors", 0, 8)


def test_the_headers_of_all_shards_share_one_limit():
    header = safetensors({"a": A}, 24)
    claims_25_mb = struct.pack("<Q", 25 * 10**6)
    places = {"a": "0.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    files = sharded(places, {"0.safetensors": header, "1.safetensors": claims_25_mb, "2.safetensors": claims_25_mb})
    files.claimed = {"1.safetensors": 10**9, "2.safetensors": 10**9}
    files.read = _spaces_for(files, "1.safetensors")  # type: ignore[method-assign]

    with pytest.raises(BrokenCheckpoint, match=r"'2\.safetensors' claims a header of 25000000 bytes"):
        read_checkpoint(files)


def _spaces_for(files: MemoryFiles, shard: str) -> Callable[[str, int, int], bytes]:
    """Let one shard hold the header {"b": ...} in 25 MB of spaces; its tensor fills what the file claims to be long."""
    data = 10**9 - 8 - 25 * 10**6
    header = json.dumps({"b": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}).encode().ljust(25 * 10**6)
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
    monkeypatch.setattr(headers, "believed_tensors", lambda config: 1)
    monkeypatch.setattr(headers, "MARKS_PER_TENSOR", 100)

    with pytest.raises(BrokenCheckpoint, match=r"2 tensors were found up to 'two\.safetensors'; .* at most 1 are"):
        read_checkpoint(sharded({"a": "one.safetensors", "b": "two.safetensors"}, TWO_SHARDS))


def test_a_file_that_gives_fewer_bytes_than_it_claims_is_broken():
    files = single({"a": A}, 24)
    files.claimed["config.json"] = 1000

    with pytest.raises(BrokenCheckpoint, match="of 1000 bytes"):
        read_checkpoint(files)


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
    read_or_refuse(MemoryFiles({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": content}))


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

    read_or_refuse(
        MemoryFiles({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": bytes(content[: len(content) - cut])})
    )


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
