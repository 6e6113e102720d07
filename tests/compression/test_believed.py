"""The bound on tensors leaves room for mixtures of published sizes and none for a small model with headers without end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compression.checkpoint import headers
from compression.checkpoint.believed import believed_tensors
from compression.checkpoint.headers import read_checkpoint
from compression.errors import BrokenCheckpoint, NotAMoE
from tests.compression.made_checkpoints import A, mixtral, sharded, single
from tests.faults.made_families import FAMILIES, made


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8}, 995),
        # 58 mixtures of 256 experts, three matrices each with a scale of its own, and a block that predicts further tokens
        ({"model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256}, 59 * 256 * 6 + 62 * 30),
        # the same with 384 experts, each matrix in three parts: about the largest there is
        ({"model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 384}, 60 * 384 * 9 + 3000),
        # two towers of experts, of which config.json's own counts speak of one
        (
            {
                "model_type": "qwen3_omni_moe",
                "thinker_config": {"text_config": {"num_hidden_layers": 48, "num_experts": 128}},
            },
            (48 + 20) * (3 * 128 + 20) + 2000,
        ),
    ],
)
def test_mixtures_of_published_sizes_are_believed(config: dict[str, Any], tensors: int):
    assert tensors <= believed_tensors(config) <= 250_000


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_of_few_experts_is_believed_few_tensors(family: str):
    config, tensors = made(family)

    assert len(tensors) * 5 < believed_tensors(config) < 40_000


@pytest.mark.parametrize("blocks", [None, True, "61", 10**9, -1, 0, 2.0, []])
def test_a_count_that_is_none_or_absurd_is_not_multiplied(blocks: object):
    config, _ = mixtral()

    assert believed_tensors({**config, "num_hidden_layers": blocks}) < 12_000


def test_experts_beyond_belief_are_not_multiplied():
    config, _ = mixtral()

    assert believed_tensors({**config, "num_local_experts": 10**9}) == believed_tensors({"model_type": "mixtral"})


def test_a_small_model_with_tensors_without_end_is_refused_before_its_header_is_parsed(monkeypatch: pytest.MonkeyPatch):
    parsed: list[int] = []
    real_parse = json.loads
    monkeypatch.setattr(headers.json, "loads", lambda text, **how: parsed.append(len(text)) or real_parse(text, **how))
    config, _ = mixtral()
    tensors = {f"x{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]} for number in range(60_000)}

    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors holds \d+ brackets and commas, more than the"):
        read_checkpoint(single(tensors, len(tensors), config))

    assert max(parsed) < 1000


def test_a_long_index_is_refused_before_it_is_parsed():
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors\.index\.json holds \d+ brackets and commas"):
        read_checkpoint(sharded({f"x{number}": "one.safetensors" for number in range(200_000)}, {}))


def test_a_family_that_is_not_supported_is_refused_before_a_header_is_read():
    files = single({"a": A}, 24, {"model_type": "llama"})

    with pytest.raises(NotAMoE, match="'llama'"):
        read_checkpoint(files)

    assert {name for name, _, _ in files.reads} == {"config.json"}
