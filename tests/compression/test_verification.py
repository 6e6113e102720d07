"""Verification refuses an artifact that is not, bit for bit, the model that was computed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.errors import BrokenCheckpoint, VerificationFailed
from compression.evaluation.verification import in_windows, verify
from compression.pipeline import compress
from tests.compression.made_artifacts import tampered
from tests.compression.test_pipeline import GPTQ, a_request
from tests.tiny_models import MODEL_TYPES

IDS_BS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def artifact(tiny_model_factory, tmp_path_factory):
    folder = tiny_model_factory("mixtral", dtype="bfloat16")
    out = tmp_path_factory.mktemp("artifact") / "out"
    compress(a_request(folder, [{**GPTQ, "method": "rtn", "attention": "W8A16"}]), folder, out)
    return out


@torch.no_grad()
def stock_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS_BS, use_cache=False).logits


def check(folder, logits_BSV, *, whole=True):
    return verify(
        folder,
        ARCHITECTURES["mixtral"],
        ids_BS=IDS_BS,
        logits_BSV=logits_BSV,
        whole=whole,
        on_block=lambda *_: None,
    )


@pytest.mark.parametrize("whole", [True, False])
def test_the_artifact_itself_passes(artifact, whole):
    assert check(artifact, stock_logits(artifact), whole=whole).largest_logit_difference == 0.0


@pytest.mark.parametrize("whole", [True, False])
def test_one_changed_code_is_noticed(artifact, tmp_path, whole):
    expected = stock_logits(artifact)

    def flip(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight_packed"][0, 0] ^= 1

    with pytest.raises(VerificationFailed, match="differ by up to"):
        check(tampered(artifact, tmp_path, flip), expected, whole=whole)


def test_a_zero_scale_is_named(artifact, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"

    with pytest.raises(VerificationFailed, match=name.replace(".", r"\.") + " holds a zero scale"):
        check(tampered(artifact, tmp_path, lambda tensors: tensors[name][3].zero_()), stock_logits(artifact))


def test_a_nan_is_named(artifact, tmp_path):
    name = "model.layers.1.input_layernorm.weight"

    with pytest.raises(VerificationFailed, match=name.replace(".", r"\.") + " holds a NaN"):
        check(tampered(artifact, tmp_path, lambda tensors: tensors[name][0].fill_(torch.nan)), stock_logits(artifact))


@pytest.mark.parametrize("whole", [True, False])
def test_a_tensor_that_the_stock_loader_would_make_up_is_refused(artifact, tmp_path, whole):
    """The stock loader starts with random weights where a name is missing: a warning, no error."""

    def rename(tensors):
        tensors["model.layers.1.post_attention_layernorms.weight"] = tensors.pop("model.layers.1.post_attention_layernorm.weight")

    copy = tampered(artifact, tmp_path, rename)
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.1.post_attention_layernorm.", "layers.1.post_attention_layernorms."))

    with pytest.raises((VerificationFailed, BrokenCheckpoint), match="post_attention_layernorm"):
        check(copy, stock_logits(artifact), whole=whole)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_windows_of_any_width_compute_what_the_whole_computes(tiny_model_factory, tmp_path, model_type, blocks):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    steps = [{"step": "expert_drop", "criterion": "frequency", "experts_kept": 4}]
    compress(a_request(folder, steps), folder, tmp_path / "out")

    logits_BSV = in_windows(tmp_path / "out", ARCHITECTURES[model_type], ids_BS=IDS_BS, device=torch.device("cpu"), blocks=blocks)

    assert torch.equal(logits_BSV, stock_logits(tmp_path / "out"))
