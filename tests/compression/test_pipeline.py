"""A whole run: the artifact is as big as the plan says, opens in the stock loader, and is what was computed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compression.block import Shell
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.packing import unpack
from compression.checkpoint.writer import Writer
from compression.errors import ConstraintViolated, NotLoadableInProfile, Stopped, VerificationFailed
from compression.pipeline import compress
from compression.plan import make_plan
from compression.progress import BlockDone, StageStarted
from compression.request import Compression
from tests.tiny_models import MODEL_TYPES

WORDS = "the expert the router chose was not the one that the other tokens had wanted so they went home "
TRIMS = {
    "no trim": [],
    "expert_drop": [{"step": "expert_drop", "criterion": "reap", "experts_kept": 4}],
    "block_drop": [{"step": "block_drop", "blocks_dropped": 1}],
}
GPTQ = {"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 32}


def a_request(folder, steps, **more):
    return Compression.model_validate(
        {
            "model": folder.as_uri(),
            "recipe": {"steps": steps},
            "calibration": {"source": {"inline": [WORDS * 20]}, "samples": 8, "sequence_length": 32},
            "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
            **more,
        }
    )


def tensor_bytes(folder):
    return sum(header.bytes for header in read_checkpoint(FolderFiles(folder)).tensors.values())


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_artifact_bytes_equal_plan_bytes_and_the_stock_loader_computes_the_same_logits(
    tiny_model_factory, tmp_path, model_type, scheme, trim
):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    quantize = [] if model_type == "gpt_oss" else [{**GPTQ, "method": "rtn" if scheme == "W8A16" else "gptq", "scheme": scheme}]
    if not (quantize or TRIMS[trim]):
        pytest.skip("gpt_oss keeps its experts in one tensor that no stock loader reads packed: there is nothing to do")
    request = a_request(folder, TRIMS[trim] + quantize)
    plan = make_plan(request, read_checkpoint(FolderFiles(folder)))

    report = compress(request, folder, tmp_path / "out")

    assert tensor_bytes(tmp_path / "out") - plan.bytes_after == 0
    assert report.bytes_after == plan.bytes_after < plan.bytes_before == tensor_bytes(folder)
    assert report.verification.largest_logit_difference == 0.0


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_gpt_oss_is_not_quantized_and_says_why(tiny_model_factory, tmp_path, scheme):
    folder = tiny_model_factory("gpt_oss", dtype="bfloat16")

    with pytest.raises(NotLoadableInProfile, match="gpt_oss"):
        compress(a_request(folder, [{**GPTQ, "scheme": scheme}]), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("others", ["W4A16", "W8A16"])
def test_attention_shared_experts_and_dense_layers_take_their_own_scheme(tiny_model_factory, tmp_path, model_type, others):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    request = a_request(folder, [{**GPTQ, "attention": others, "shared_experts": others, "dense": others}])

    report = compress(request, folder, tmp_path / "out")

    assert report.verification.largest_logit_difference == 0.0
    assert {row.scheme for row in report.ledger if "self_attn" in row.tensor} == {others}
    assert tensor_bytes(tmp_path / "out") == report.bytes_planned


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_group_size_reopens_exactly(tiny_model_factory, tmp_path, group_size):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", hidden_size=128)

    report = compress(a_request(folder, [{**GPTQ, "group_size": group_size}]), folder, tmp_path / "out")

    assert report.verification.largest_logit_difference == 0.0
    assert tensor_bytes(tmp_path / "out") == report.bytes_planned


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_artifact_too_big_for_memory_is_verified_in_windows_of_blocks(tiny_model_factory, tmp_path, model_type):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    steps = TRIMS["block_drop"] + ([] if model_type == "gpt_oss" else [{**GPTQ, "method": "rtn"}])

    report = compress(a_request(folder, steps), folder, tmp_path / "out", host_memory=1)

    assert report.verification.mode == "windows"
    assert report.verification.largest_logit_difference == 0.0


def test_a_float32_checkpoint_keeps_its_dtype_and_its_scales_are_float32(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("olmoe", dtype="float32")

    report = compress(a_request(folder, [GPTQ]), folder, tmp_path / "out")

    shard = load_file(tmp_path / "out" / "model-00002-of-00005.safetensors")
    assert shard["model.layers.0.mlp.experts.0.up_proj.weight_scale"].dtype == torch.float32
    assert report.verification.largest_logit_difference == 0.0


def test_dequantized_by_hand_the_artifact_is_the_model_that_the_stock_loader_opens(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16")
    compress(a_request(folder, [GPTQ]), folder, tmp_path / "out")

    shard = load_file(tmp_path / "out" / "model-00003-of-00005.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.6.w2"
    codes_OI = unpack(shard[f"{name}.weight_packed"], 4, 128)
    scale_OG = shard[f"{name}.weight_scale"]
    by_hand_OI = (codes_OI.view(64, 4, 32) * scale_OG[:, :, None]).view(64, 128)

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.experts.down_proj[6]
    assert torch.equal(opened, by_hand_OI)


def test_an_artifact_that_is_not_as_big_as_planned_is_not_published(tiny_model_factory, tmp_path, monkeypatch):
    folder = tiny_model_factory("mixtral", dtype="bfloat16")
    original = Writer.block

    def with_a_stray(self, i, saved, on_shard):
        original(self, i, {**saved, "stray": torch.zeros(3)} if i == 3 else saved, on_shard)

    monkeypatch.setattr(Writer, "block", with_a_stray)
    monkeypatch.setattr("compression.block.Shell._load", lenient(Shell._load))

    with pytest.raises(VerificationFailed, match="where the plan promised"):
        compress(a_request(folder, TRIMS["expert_drop"]), folder, tmp_path / "out")


def lenient(load):
    """The stock loader refuses strays by itself; here it shall be the bytes that give them away."""
    return lambda self, saved: load(self, {name: tensor for name, tensor in saved.items() if name != "stray"})


def test_steps_in_another_order_give_the_very_same_artifact(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("qwen3_moe", dtype="bfloat16")
    drop = TRIMS["expert_drop"][0]

    compress(a_request(folder, [drop, GPTQ]), folder, tmp_path / "a")
    report = compress(a_request(folder, [GPTQ, drop]), folder, tmp_path / "b")

    files = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert "steps_reordered" in {warning["code"] for warning in report.warnings}


def test_the_report_says_the_quality_that_an_independent_computation_finds(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="float32")
    request = a_request(folder, TRIMS["block_drop"])
    report = compress(request, folder, tmp_path / "out")

    ids_NS = held_out_tokens(request, folder)
    before, after = (stock_log_probabilities(path, ids_NS) for path in (folder, tmp_path / "out"))
    loss_after = -after[:, :-1].gather(2, ids_NS[:, 1:, None]).mean().item()
    divergence = (before[:, :-1].exp() * (before[:, :-1] - after[:, :-1])).sum(-1).mean().item()
    agreement = (before[:, :-1].argmax(-1) == after[:, :-1].argmax(-1)).double().mean().item()

    assert report.quality.perplexity_after == pytest.approx(math.exp(loss_after), rel=1e-5)
    assert report.quality.divergence == pytest.approx(divergence, rel=1e-4)
    assert report.quality.top1_agreement == pytest.approx(agreement)


def held_out_tokens(request, folder):
    from compression.calibration import load_evaluation

    return load_evaluation(request.evaluation.perplexity, folder, sequence_length=32).ids_NS


@torch.no_grad()
def stock_log_probabilities(folder, ids_NS):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids_NS).logits.double().log_softmax(-1)


def test_the_ledger_has_a_row_for_every_quantized_weight_and_names_what_was_rounded(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("olmoe", dtype="bfloat16")
    # One short sample of one word: some experts see no token at all.
    calibration = {"source": {"inline": ["so so so so so so so so so so"]}, "samples": 1, "sequence_length": 8}

    report = compress(a_request(folder, [GPTQ], calibration=calibration), folder, tmp_path / "out")

    assert len(report.ledger) == 4 * 8 * 3
    idle = [row for row in report.ledger if row.tokens == 0]
    assert idle
    assert all(row.method_used == "rtn" and row.damping is None for row in idle)
    assert any("had too little calibration to go by and were slimmed by rtn" in line for line in report.lost)
    assert report.verification.largest_logit_difference == 0.0


def test_progress_never_goes_back_and_passes_through_every_stage(tiny_model_factory, tmp_path):
    folder, listener = tiny_model_factory("mixtral", dtype="bfloat16"), Recorder()

    compress(a_request(folder, [*TRIMS["expert_drop"], GPTQ]), folder, tmp_path / "out", listener)

    fractions = [event.fraction for event in listener.events if isinstance(event, BlockDone | StageStarted)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    stages = [event.stage for event in listener.events if isinstance(event, StageStarted)]
    assert stages == ["planning", "studying", "compressing", "evaluating", "verifying"]


def test_a_run_stops_at_the_end_of_the_block_in_hand(tiny_model_factory, tmp_path):
    folder, listener = tiny_model_factory("mixtral", dtype="bfloat16"), Recorder(stop_in="compressing")

    with pytest.raises(Stopped):
        compress(a_request(folder, [GPTQ]), folder, tmp_path / "out", listener)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_an_artifact_worse_than_the_constraint_fails_the_run_but_only_if_asked(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16")
    steps = [{**GPTQ, "method": "rtn"}, *TRIMS["block_drop"]]
    strict = {"min_retention": 1.0}

    with pytest.raises(ConstraintViolated, match="min_retention"):
        compress(a_request(folder, steps, constraints=strict), folder, tmp_path / "a")
    compress(a_request(folder, steps, constraints={**strict, "on_violation": "report"}), folder, tmp_path / "b")


def test_the_artifact_carries_its_report_its_card_and_its_tokenizer(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16")

    report = compress(a_request(folder, [GPTQ]), folder, tmp_path / "out")

    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    quality = report.quality
    assert report.result()["retention"] == quality.retention == math.exp(quality.loss_before - quality.loss_after) != 1.0
    assert stored["quality"]["perplexity_after"] == report.quality.perplexity_after
    assert stored["ratio"] == report.ratio
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert f"{report.quality.perplexity_after:.3f}" in (tmp_path / "out" / "README.md").read_text()


class Recorder:
    def __init__(self, stop_in=None):
        self.events = []
        self._stop_in = stop_in

    def on_event(self, event):
        self.events.append(event)

    def should_stop(self):
        return isinstance(self.events[-1], BlockDone) and self.events[-1].stage == self._stop_in


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_blocks_told_apart_by_name_are_as_big_as_planned_and_open_again(tiny_model_factory, tmp_path, model_type):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    steps = [
        {"step": "block_drop", "blocks": [2]},
        {"step": "expert_drop", "experts_kept": 8, "experts_kept_in": {"1": 6}},
        {**GPTQ, "attention": "W8A16", "by_block": {"1": {"experts": "W3A16"}, "3": {"experts": "keep", "attention": "keep"}}},
    ]

    report = compress(a_request(folder, steps, profile="custom"), folder, tmp_path / "out")

    assert tensor_bytes(tmp_path / "out") == report.bytes_planned
    assert report.verification.largest_logit_difference == 0.0
    assert [row.action for row in report.blocks] == ["keep", "keep", "drop", "keep"]
    assert len(report.blocks[1].experts_kept or ()) == 6
    assert {
        row.scheme
        for row in report.ledger
        if "layers.1." in row.tensor and "experts." in row.tensor and "shared" not in row.tensor
    } == {"W3A16"}
