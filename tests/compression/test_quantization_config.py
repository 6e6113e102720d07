"""What config.json says of quantized weights: stock transformers opens them as the very numbers that were stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantization_config
from compression.evaluation.verification import verify
from compression.plan import make_plan
from compression.recipe import Quantize
from compression.sweep import Push, Stream, sweep
from tests.compression.made_artifacts import rounded
from tests.compression.made_checkpoints import request

IDS_BS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(11))
MIXTRAL = ARCHITECTURES["mixtral"]


def config_of(**settings: Any) -> dict[str, Any]:
    return quantization_config(MIXTRAL, Quantize(**settings))


def test_floats_have_a_scale_per_row_and_quantize_what_enters_per_token():
    config = config_of(scheme="FP8_DYNAMIC", group_size=-1)

    assert config["format"] == "float-quantized"
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "format": "float-quantized",
            "weights": {
                "num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel", "group_size": None,
            },
            "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"},
            "output_activations": None,
        }
    }  # fmt: skip


@pytest.mark.parametrize(("scheme", "bits"), [("W8A16", 8), ("W4A16", 4), ("W3A16", 3), ("W2A16", 2)])
def test_integers_of_any_width_are_pack_quantized_and_leave_activations_alone(scheme: str, bits: int):
    config = config_of(scheme=scheme, group_size=64)

    [group] = config["config_groups"].values()
    assert config["format"] == group["format"] == "pack-quantized"
    assert group["weights"] == {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 64,
    }  # fmt: skip
    assert group["input_activations"] is None


def test_integers_beside_floats_are_of_mixed_precision_and_each_group_says_its_own_format():
    config = config_of(scheme="W4A16", attention="FP8_DYNAMIC", group_size=32)

    assert config["format"] == "mixed-precision"
    experts, attention = config["config_groups"].values()
    assert (experts["format"], experts["targets"]) == ("pack-quantized", [r"re:.*\.experts\..*"])
    assert (attention["format"], attention["targets"]) == ("float-quantized", [r"re:.*\.self_attn\..*"])


def test_integers_of_two_widths_are_of_one_format():
    assert config_of(scheme="W4A16", attention="W8A16", group_size=32)["format"] == "pack-quantized"


def test_no_sparsity_is_ever_declared():
    assert not [key for key in config_of(scheme="W4A16", group_size=32) if "sparsity" in key]


ROWS = [
    ("mixtral", {"scheme": "W3A16"}),
    ("qwen3_moe", {"scheme": "W2A16"}),
    ("phimoe", {"scheme": "W3A16", "attention": "W2A16"}),
    ("olmoe", {"scheme": "FP8_DYNAMIC"}),
    ("mixtral", {"scheme": "FP8_DYNAMIC", "attention": "FP8_DYNAMIC"}),
    ("qwen2_moe", {"scheme": "W4A16", "attention": "FP8_DYNAMIC", "shared_experts": "W8A16", "dense": "FP8_DYNAMIC"}),
    ("deepseek_v3", {"scheme": "FP8_DYNAMIC", "attention": "W4A16", "shared_experts": "FP8_DYNAMIC", "dense": "W2A16"}),
    ("deepseek_v2", {"scheme": "W2A16", "attention": "W8A16", "shared_experts": "FP8_DYNAMIC", "dense": "W3A16"}),
]


@pytest.fixture(scope="module", params=ROWS, ids=str)
def artifact(request, tiny_model_factory, tmp_path_factory):
    """(source, artifact, the same with whole weights, step), rounded to nearest."""
    model_type, settings = request.param
    floats = set(settings.values()) == {"FP8_DYNAMIC"}
    step = Quantize(method="rtn", group_size=-1 if floats else 32, **settings)
    source = tiny_model_factory(model_type, dtype="bfloat16")
    out = tmp_path_factory.mktemp("quantized") / "out"
    return source, out, rounded(source, out, step), step


def test_the_stock_loader_holds_the_experts_that_were_stored(artifact):
    _, out, dense, _ = artifact

    opened, expected = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, dense))

    experts = [name for name, _ in expected.named_parameters() if ".experts." in name]
    assert experts
    stored = opened.state_dict()
    assert [name for name in experts if not torch.equal(stored[name], expected.get_parameter(name))] == []


def test_the_artifact_is_as_big_as_its_plan(artifact):
    source, out, _, step = artifact
    plan = make_plan(request(step.model_dump(), profile="custom"), read_checkpoint(FolderFiles(source)))

    headers = read_checkpoint(FolderFiles(out)).tensors.values()

    assert sum(header.bytes for header in headers) == plan.tensor_bytes


@pytest.mark.parametrize("whole", [True, False])
def test_block_by_block_it_computes_what_the_stock_loader_computes(artifact, whole):
    _, out, _, _ = artifact
    reader = Reader(out)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, IDS_BS)
    sweep(shell, reader, stream, Push(), lambda *_: None)

    row = ARCHITECTURES[json.loads((out / "config.json").read_text())["model_type"]]
    verified = verify(out, row, ids_BS=IDS_BS, logits_BSV=next(stream.logits(shell)), whole=whole, on_block=lambda *_: None)

    assert verified.largest_logit_difference == 0.0
    assert verified.opened_with.startswith("transformers ")
