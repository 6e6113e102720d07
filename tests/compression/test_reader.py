"""The reader gives one block's tensors exactly as they are saved, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoint.reader import Reader
from compression.errors import BrokenCheckpoint
from compression.pipeline import compress
from tests.compression.test_pipeline import GPTQ, a_request, tensor_bytes
from tests.tiny_models import MODEL_TYPES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_read_equals_what_the_safetensors_library_reads(tiny_model_factory, dtype):
    folder = tiny_model_factory("deepseek_v3", dtype=dtype)
    reader = Reader(folder)

    read = {**reader.outside(), **{name: tensor for block in range(4) for name, tensor in reader.block(block).items()}}

    stored = load_file(folder / "model.safetensors")
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) and read[name].dtype == stored[name].dtype for name in stored)


def test_a_block_is_only_its_own_tensors(tiny_model_factory):
    assert {name.split(".")[2] for name in Reader(tiny_model_factory("mixtral")).block(3)} == {"3"}


def test_a_file_cut_short_after_its_header_was_read_is_named(tiny_model_factory, tmp_path):
    folder = shutil.copytree(tiny_model_factory("mixtral"), tmp_path / "copy")
    reader = Reader(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors ends inside"):
        [reader.block(block) for block in range(4)]


@pytest.mark.parametrize(("dtype", "name"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_a_config_without_a_dtype_takes_that_of_the_weights(tiny_model_factory, tmp_path, dtype, name):
    folder = shutil.copytree(tiny_model_factory("mixtral", dtype=dtype), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}))

    assert Reader(folder).config["dtype"] == name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_blocks_past_the_last_and_rotary_buffers_are_left_behind(tiny_model_factory, tmp_path, model_type):
    """Real checkpoints carry tensors that predict further tokens, and old ones their rotary tables."""
    folder = shutil.copytree(tiny_model_factory(model_type, dtype="bfloat16"), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.4.{name}": torch.ones(4) for name in ("enorm.weight", "eh_proj.weight")}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    steps = [{"step": "block_drop", "blocks_dropped": 1}] + ([] if model_type == "gpt_oss" else [{**GPTQ, "method": "rtn"}])

    report = compress(a_request(folder, steps), folder, tmp_path / "out")

    assert "mtp_dropped" in {warning["code"] for warning in report.warnings}
    assert report.bytes_before == sum(tensor.nbytes for tensor in tensors.values())
    assert tensor_bytes(tmp_path / "out") == report.bytes_planned
    assert report.verification.largest_logit_difference == 0.0
