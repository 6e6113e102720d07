"""Whatever a checkpoint's maker wrote, planning it ends soon, in a plan or in a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from compression.checkpoint import headers
from compression.checkpoint.headers import read_checkpoint
from compression.errors import BrokenCheckpoint, NotAMoE, QuantizedSource, RemoteCodeRequired, SlimtrimError
from compression.plan import make_plan
from compression.request import Compression
from tests.compression.made_checkpoints import (
    CONFIG,
    TWO_SHARDS,
    A,
    MemoryFiles,
    checkpoint,
    request,
    safetensors,
    sharded,
    single,
)
from tests.faults.fuzz_checkpoints import run
from tests.faults.hostile import draw, write
from tests.faults.made_families import FAMILIES, made


def test_hundreds_of_hostile_checkpoints_end_in_a_plan_or_a_refusal(tmp_path: Path):
    """Ten thousand are tried by hand: ``python -m tests.faults.fuzz_checkpoints``."""
    tally = run(300, 4001, tmp_path, seconds=20)

    assert not tally.faults
    assert {"planned", "broken_checkpoint"} <= set(tally.outcomes), "some cases are still sound, others are not"


def test_a_case_is_known_by_its_number(tmp_path: Path):
    for number in range(4001, 4021):
        (kind, first), (again, second) = (draw(Random(number)) for _ in range(2))
        folders = [write(draft, tmp_path / name) for draft, name in ((first, "one"), (second, "two"))]
        assert kind == again
        one, two = (sorted(path.name for path in folder.iterdir()) for folder in folders)
        assert one == two


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_model_that_is_spoilt_is_sound_in_every_family(model_type: str):
    config, tensors = made(model_type)

    assert make_plan(request({"step": "expert_drop", "experts_kept": 4}), checkpoint(config, tensors)).feasible


@pytest.mark.parametrize("model_type", [["mixtral"], {"a": 1}, 7, None])
def test_a_model_type_that_is_no_name_is_refused_with_and_without_code_beside_it(model_type: object):
    with pytest.raises(RemoteCodeRequired):
        read_checkpoint(single({"a": A}, 24, {"model_type": model_type, "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(NotAMoE):
        make_plan(request({"step": "quantize"}), checkpoint({"model_type": model_type}, {}))


def test_a_refusal_does_not_repeat_a_huge_value():
    with pytest.raises(NotAMoE) as refusal:
        make_plan(request({"step": "quantize"}), checkpoint({"model_type": 10**4000}, {}))

    assert len(refusal.value.message) < 2000


def test_half_a_letter_in_a_strangers_file_does_not_make_the_refusal_unsendable():
    config, tensors = made("mixtral")
    config["quantization_config"] = {"quant_method": "\ud800"}

    with pytest.raises(QuantizedSource) as refusal:
        make_plan(request({"step": "quantize"}), checkpoint(config, tensors))
    assert SlimtrimError("compressed as \ud800").message.encode() == rb"compressed as \ud800"
    assert refusal.value.message.encode()


def test_the_width_of_dense_blocks_is_asked_for_by_name():
    config, tensors = made("deepseek_v3")
    del config["intermediate_size"]
    search = Compression.model_validate({"model": "owner/name", "target_memory": 300_000})

    with pytest.raises(BrokenCheckpoint, match="intermediate_size"):
        make_plan(search, checkpoint(config, tensors))


def test_marks_are_counted_over_the_headers_of_all_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(headers, "believed_tensors", lambda config: 14)
    monkeypatch.setattr(headers, "MARKS_PER_TENSOR", 1)  # the index has 5, the headers 8 and 7
    places = {"a": "one.safetensors", "b": "two.safetensors"}

    with pytest.raises(BrokenCheckpoint, match=r"'?two\.safetensors'? holds \d+ brackets"):
        read_checkpoint(sharded(places, TWO_SHARDS))


def test_a_long_header_must_be_ascii_for_one_letter_would_make_all_of_it_four_times_as_big():
    long = json.dumps({"__metadata__": {"x": "x" * 5 * 2**20 + "\U0001f600"}, "a": A}, ensure_ascii=False).encode()
    plain = json.dumps({"__metadata__": {"x": "x" * 5 * 2**20}, "a": A}).encode()

    assert read_checkpoint(single(plain, 24)).tensors
    with pytest.raises(BrokenCheckpoint, match="ASCII"):
        read_checkpoint(single(long, 24))


def test_a_config_of_nothing_but_brackets_is_refused_before_it_is_parsed():
    config = b'{"model_type": "mixtral", "x": [' + b"[]," * 10**6 + b"[]]}"

    with pytest.raises(BrokenCheckpoint, match=r"config\.json holds \d+ brackets"):
        read_checkpoint(MemoryFiles({"config.json": config, "model.safetensors": safetensors({"a": A}, 24)}))
    assert read_checkpoint(single({"a": A}, 24, CONFIG)).tensors
