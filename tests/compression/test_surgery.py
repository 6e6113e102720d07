"""Cutting saved tensors and configs: what stays keeps its bytes, and the stock class agrees with the config."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.checkpoint.writer import Writer
from compression.compress import Compressor
from compression.resume import FinishedBlocks
from compression.slim import Slimming
from compression.sweep import Stream
from compression.trimming import Cuts
from compression.trimming.surgery import cut_config
from compression.trimming.view import TrimmedReader
from tests.tiny_models import MODEL_TYPES, VARIANTS

IDS_NS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))
NAMES = [*MODEL_TYPES, "qwen2_moe_sparse_step"]


def family(name):
    return ARCHITECTURES[VARIANTS[name][0] if name in VARIANTS else name]


def cut(source, out, architecture, *, blocks=None, experts=None):
    """Cut a checkpoint and return the logits that the compressing process computed."""
    reader = Reader(source)
    count = reader.config["num_hidden_layers"]
    mixtures = [b for b in range(count) if architecture.router_name(b) in reader.checkpoint.tensors]
    kept = tuple(range(count)) if blocks is None else blocks
    ids = tuple(range(8)) if experts is None else experts
    cuts = Cuts(kept, {b: ids for b in mixtures if b in kept})
    trimmed = TrimmedReader(reader, architecture, cuts)
    writer, outside = Writer(out, trimmed.config), trimmed.outside()
    writer.outside(outside)
    shell = Shell(trimmed.config, outside)
    witness = Stream(shell, IDS_NS)
    compressor = Compressor(
        architecture,
        Slimming(None, None),
        shell,
        shell,
        writer,
        calibration=None,
        witness=witness,
        finished=FinishedBlocks(None, "", {}),
    )
    compressor.run(trimmed, lambda *_: None)
    writer.finish(source)
    return next(witness.logits(shell))


@torch.no_grad()
def stock(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_NS, use_cache=False).logits


def all_tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_writes_the_very_same_tensors(tiny_model_factory, tmp_path, name):
    source = tiny_model_factory(name, dtype="bfloat16")

    ours = cut(source, tmp_path / "out", family(name))

    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(ours, logits(stock(source)))


@pytest.mark.parametrize("name", NAMES)
def test_dropping_experts_equals_slicing_the_stock_model_in_memory(tiny_model_factory, tmp_path, name):
    source, architecture, kept = tiny_model_factory(name), family(name), [1, 2, 4, 7]

    ours = cut(source, tmp_path / "out", architecture, experts=tuple(kept))

    sliced = stock(tmp_path / "out")
    with torch.no_grad():
        for mine, theirs in zip(sliced.get_decoder().layers, stock(source).get_decoder().layers, strict=True):
            if hasattr(theirs.mlp, "experts"):
                mine = mine.mlp.state_dict()
                for key, tensor in theirs.mlp.state_dict().items():
                    wanted = tensor if "shared" in key else tensor[kept]
                    assert torch.equal(mine[key], wanted), key
    assert torch.equal(ours, logits(sliced))


@pytest.mark.parametrize("name", NAMES)
def test_a_block_whose_output_projections_are_zero_can_be_dropped_without_changing_one_logit(tiny_model_factory, tmp_path, name):
    architecture = family(name)
    model = stock(tiny_model_factory(name))
    gone = 2 if name != "qwen2_moe_sparse_step" else 1
    with torch.no_grad():
        for parameter_name, parameter in model.get_decoder().layers[gone].named_parameters():
            if any(part in parameter_name for part in ("o_proj", "down_proj")):
                parameter.zero_()
    model.save_pretrained(tmp_path / "source")

    kept = tuple(block for block in range(4) if block != gone)
    ours = cut(tmp_path / "source", tmp_path / "out", architecture, blocks=kept)

    assert torch.equal(ours, logits(model))
    assert torch.equal(logits(stock(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_perturbing_one_expert_changes_exactly_that_tensor_on_disk(tiny_model_factory, tmp_path, name):
    source, architecture = tiny_model_factory(name), family(name)
    model = stock(source)
    block = model.get_decoder().layers[3]
    with torch.no_grad():
        block.mlp.experts.down_proj[5] += 0.25
    model.save_pretrained(tmp_path / "perturbed")

    cut(source, tmp_path / "a", architecture)
    cut(tmp_path / "perturbed", tmp_path / "b", architecture)

    a, b = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    changed = [key for key in a if not torch.equal(a[key], b[key])]
    down = architecture.gate_up_down[2]
    prefix = architecture.experts_prefix(3)
    assert changed == [f"{prefix}.down_proj" if architecture.fused_on_disk else f"{prefix}.5.{down}.weight"]


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_spelling_of_the_expert_count_says_what_the_tensors_say(tiny_model_factory, tmp_path, name):
    architecture = family(name)

    cut(tiny_model_factory(name), tmp_path / "out", architecture, experts=(0, 1, 4, 5))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    spellings = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"} & config.keys()
    assert set(architecture.expert_count_keys) <= spellings
    assert {config[key] for key in spellings} == {4}


def test_per_layer_lists_are_cut_with_their_block(tiny_model_factory, tmp_path):
    cut(tiny_model_factory("gpt_oss"), tmp_path / "out", family("gpt_oss"), blocks=(0, 2, 3))

    before = json.loads((tiny_model_factory("gpt_oss") / "config.json").read_text())["layer_types"]
    after = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert after == [before[0], before[2], before[3]]


def test_dense_blocks_stay_dense_when_a_mixture_between_them_goes(tiny_model_factory, tmp_path):
    name = "qwen2_moe_sparse_step"

    cut(tiny_model_factory(name), tmp_path / "out", family(name), blocks=(0, 2, 3))

    model = stock(tmp_path / "out")
    assert [
        isinstance(block.mlp.gate_proj, nn.Linear) if hasattr(block.mlp, "gate_proj") else False for block in model.model.layers
    ] == [
        True,
        True,
        False,
    ]


def test_no_code_travels_with_the_artifact(tiny_model_factory, tmp_path):
    config = {**Reader(tiny_model_factory("deepseek_v3")).config, "auto_map": {"AutoModel": "code.Model"}}

    assert "auto_map" not in cut_config(config, family("deepseek_v3"), Cuts((0, 1, 2, 3), {}))
