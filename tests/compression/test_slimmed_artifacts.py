"""Whole runs that prune and quantize: what is stored is what was promised, and nothing else has changed.

Two blocks are enough: one to be slimmed, and one that is calibrated on what it has become.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.calibration import load_calibration
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.packing import unpack
from compression.checkpoint.reader import Reader
from compression.pipeline import compress
from compression.plan import make_plan
from compression.recipe import BITS
from compression.runtime.slimtrim_runtime import open_model
from compression.slim import Slimming, slim_
from compression.sweep import Stream, working_dtype
from tests.compression.test_pipeline import a_request, tensor_bytes
from tests.tiny_models import EXPERT_WIDTH, HIDDEN, MODEL_TYPES

PRUNES = {
    "magnitude": {"step": "prune", "method": "magnitude", "sparsity": 0.5},
    "wanda": {"step": "prune", "method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"step": "prune", "method": "sparsegpt", "pattern": "2:4"},
}
QUANTIZE = {"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 32}


@pytest.fixture
def two_blocks(tiny_model_factory):
    return lambda model_type: tiny_model_factory(model_type, dtype="bfloat16", num_hidden_layers=2)


def slimmed(folder, out, steps, **more):
    """Run a recipe; the report, once it is as big as planned and computes, opened again, what it did when it was made."""
    request = a_request(folder, steps, **more)
    plan = make_plan(request, read_checkpoint(FolderFiles(folder)))

    report = compress(request, folder, out)

    assert report.verification.largest_logit_difference == 0.0
    assert tensor_bytes(out) == report.bytes_after == plan.tensor_bytes
    return report


def saved(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def matrices_of_experts(tensors, architecture):
    """The experts' matrices [..., O, I], by name."""
    found = {n: t for n, t in tensors.items() if architecture.component_of(n) == "experts" and not n.endswith("_bias")}
    return {name: tensor.mT if architecture.fused_on_disk else tensor for name, tensor in found.items()}


@pytest.mark.parametrize("method", PRUNES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pruning_sets_as_many_weights_to_zero_as_it_says_and_touches_nothing_but_experts(
    two_blocks, tmp_path, model_type, method
):
    folder, architecture = two_blocks(model_type), ARCHITECTURES[model_type]

    report = slimmed(folder, tmp_path / "out", [PRUNES[method]])

    before, after = saved(folder), saved(tmp_path / "out")
    weights = matrices_of_experts(after, architecture)
    assert after.keys() == before.keys()
    assert [name for name in before if not same_bytes(after[name], before[name])] == list(weights)
    for name, weight in weights.items():
        kept = weight != 0
        if method == "sparsegpt":
            assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        elif method == "wanda":
            assert (kept.sum(-1) == weight.shape[-1] // 2).all()
        elif architecture.fused_on_disk:
            assert (kept.flatten(1).sum(1) == weight[0].numel() // 2).all()
        else:
            gate, up, down = architecture.gate_up_down
            partner = {gate: up, up: gate, down: down}[name.split(".")[-2]]  # gate and up are compared as one matrix
            other = name.replace(name.split(".")[-2], partner)
            assert kept.sum() + (weights[other] != 0).sum() == weight.numel()
    assert {row.method_used for row in report.ledger} == {method}
    if method != "magnitude":
        assert {row.zeros for row in report.ledger} == {0.5}


@pytest.mark.parametrize(("scheme", "profile"), [("FP8_DYNAMIC", "portable"), ("W3A16", "custom"), ("W2A16", "custom")])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_every_method_stores_every_scheme_so_that_the_stock_loader_opens_it(
    two_blocks, tmp_path, model_type, method, scheme, profile
):
    folder, architecture = two_blocks(model_type), ARCHITECTURES[model_type]
    step = {**QUANTIZE, "method": method, "scheme": scheme}
    if scheme == "FP8_DYNAMIC":
        del step["group_size"]

    report = slimmed(folder, tmp_path / "out", [step], profile=profile)

    stored = {n: t for n, t in saved(tmp_path / "out").items() if architecture.component_of(n) == "experts"}
    if scheme == "FP8_DYNAMIC":
        assert {t.dtype for n, t in stored.items() if n.endswith(".weight")} == {torch.float8_e4m3fn}
    else:
        inputs = {HIDDEN, EXPERT_WIDTH}
        words = {t.shape[-1] for n, t in stored.items() if n.endswith(".weight_packed")}
        assert words == {-(-size * BITS[scheme] // 32) for size in inputs}
    assert len(report.ledger) == 2 * 8 * 3
    assert {row.method_used for row in report.ledger} == {method}
    before, after = (sum(getattr(row, part) for row in report.ledger) for part in ("error_before", "error_after"))
    assert after == before if method == "rtn" else after < before
    rules = "checked on the plan, engine not run" if profile == "portable" else "not followed"
    assert report.verification.rules_of_vllm == rules


def test_every_component_is_stored_by_its_own_scheme(two_blocks, tmp_path):
    step = {**QUANTIZE, "attention": "FP8_DYNAMIC", "shared_experts": "W8A16", "dense": "W4A16"}

    report = slimmed(two_blocks("deepseek_v3"), tmp_path / "out", [step])

    stored = saved(tmp_path / "out")
    attention = [t for n, t in stored.items() if re.search(r"self_attn\..*_proj(_with_mqa)?\.weight$", n)]
    assert {tensor.dtype for tensor in attention} == {torch.float8_e4m3fn}
    for part, bits in ((r"mlp\.experts\.\d+", 4), (r"mlp\.shared_experts", 8), (r"layers\.0\.mlp", 4)):
        packed = [n for n in stored if re.search(rf"{part}\.(gate|up|down)_proj\.weight_packed$", n)]
        assert packed
        for name in packed:
            inputs = int(stored[name.replace("_packed", "_shape")][1])
            assert stored[name].shape[1] == inputs * bits // 32
    # Six projections in each block's attention, and no row for what was kept: router, norms, embeddings.
    assert len(report.ledger) == 2 * 5 + 3 + 8 * 3 + 3
    assert {row.scheme for row in report.ledger if ".shared_experts." in row.tensor} == {"W8A16"}


def test_what_was_pruned_is_still_zero_after_quantization(two_blocks, tmp_path):
    architecture = ARCHITECTURES["mixtral"]

    report = slimmed(two_blocks("mixtral"), tmp_path / "out", [PRUNES["sparsegpt"], QUANTIZE])

    stored = saved(tmp_path / "out")
    packed = [name for name in stored if name.endswith(".weight_packed")]
    assert len(packed) == 2 * 8 * 3
    assert all(architecture.component_of(name) == "experts" for name in packed)
    for name in packed:
        codes_OI = unpack(stored[name], 4, int(stored[name.replace("_packed", "_shape")][1]))
        assert ((codes_OI.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
        assert (codes_OI != 0).any()
    assert {(row.method_asked, row.method_used) for row in report.ledger} == {("sparsegpt+gptq", "sparsegpt+gptq")}
    # What rounds to zero besides.
    assert all(0.5 <= row.zeros < 0.75 for row in report.ledger)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_packed_zeros_are_opened_by_the_loader_in_the_artifact_as_the_model_with_whole_weights(two_blocks, tmp_path, model_type):
    folder, step = two_blocks(model_type), {**PRUNES["sparsegpt"], "shared_experts": model_type == "qwen2_moe"}

    report = slimmed(folder, tmp_path / "packed", [step], profile="custom")
    whole = slimmed(folder, tmp_path / "whole", [step])

    opened = open_model(tmp_path / "packed").state_dict()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert opened.keys() == stock.keys()
    assert all(torch.equal(opened[name], stock[name]) for name in stock)
    assert report.bytes_after < whole.bytes_after == whole.bytes_before
    assert "slimtrim_runtime" in report.verification.opened_with
    assert "slimtrim_runtime" not in whole.verification.opened_with
    assert "open_model" in (tmp_path / "packed" / "README.md").read_text()
    # 9 bits a weight where 16 were, and eight bytes for each of two sizes.
    assert all(row.bits == 9 + 8 * 16 / (HIDDEN * EXPERT_WIDTH) for row in report.ledger if ".experts." in row.tensor)


@pytest.mark.parametrize("steps", [[QUANTIZE], [PRUNES["wanda"]]], ids=["gptq", "wanda"])
@pytest.mark.parametrize(
    "change", [{"routing_weighted": True}, {"propagate_error": False}], ids=lambda change: next(iter(change))
)
def test_how_a_method_is_calibrated_is_felt_in_what_it_stores(two_blocks, tmp_path, steps, change):
    folder, architecture = two_blocks("mixtral"), ARCHITECTURES["mixtral"]

    slimmed(folder, tmp_path / "plain", steps)
    slimmed(folder, tmp_path / "changed", [{**step, **change} for step in steps])

    plain, changed = saved(tmp_path / "plain"), saved(tmp_path / "changed")
    other = {name for name in plain if not same_bytes(plain[name], changed[name])}
    assert other
    assert {architecture.component_of(name) for name in other} == {"experts"}
    # The first block's gate and up are calibrated on the untouched embeddings either way.
    first = {name for name in other if re.search(r"layers\.0\..*\.w[13]\.", name)}
    assert bool(first) == ("routing_weighted" in change)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["keep", "W4A16"])
@pytest.mark.parametrize("propagate_error", [True, False])
def test_a_block_is_calibrated_on_what_the_blocks_before_it_give_as_they_are_or_as_they_were(
    two_blocks, tmp_path, propagate_error, attention
):
    folder, step = two_blocks("mixtral"), {**QUANTIZE, "propagate_error": propagate_error, "attention": attention}
    request = a_request(folder, [step])

    slimmed(folder, tmp_path / "out", [step])

    source, artifact = Reader(folder), Reader(tmp_path / "out")
    before = artifact if propagate_error else source
    opened, dense = Shell(before.config, before.outside()), Shell(source.config, source.outside())
    ids_NS = load_calibration(request.calibration, folder).ids_NS
    stream = Stream(dense, ids_NS, dtype=working_dtype(torch.device("cpu"), torch.bfloat16))
    with opened.live(0, before.block(0)) as block:
        stream.push(0, stream.convert_(block))
    expected = source.block(1)
    with dense.live(1, expected) as block:
        slimming = Slimming(None, request.recipe.steps[0])
        slim_(expected, stream.convert_(block), slimming, stream=stream, architecture=ARCHITECTURES["mixtral"], index=1)
    stored = artifact.block(1)
    assert stored.keys() == expected.keys()
    assert all(same_bytes(stored[name], expected[name]) for name in stored)


def test_an_expert_that_no_token_chooses_is_stored_like_the_others_and_named(two_blocks, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(two_blocks("deepseek_v3"), folder)
    # Scores lie between 0 and 1: with a correction of -100 it is never among the best.
    change(folder, "model.layers.1.mlp.gate.e_score_correction_bias", lambda bias_E: bias_E[5].fill_(-100))

    report = slimmed(folder, tmp_path / "out", [QUANTIZE])

    rows = [row for row in report.ledger if ".experts.5." in row.tensor]
    assert [(row.tokens, row.tokens_topped_up) for row in rows] == [(0, 2 * EXPERT_WIDTH)] * 3
    assert {row.method_used for row in rows} == {"gptq"}
    assert any("saw no calibration token of their own" in line and "model.layers.1.mlp.experts.5" in line for line in report.lost)
    stored = saved(tmp_path / "out")
    layout = [
        {name.split(f".{expert}.")[1]: (t.shape, t.dtype) for name, t in stored.items() if f".mlp.experts.{expert}." in name}
        for expert in range(8)
    ]
    assert layout[5] == layout[0]
    assert len(layout[5]) == 9


def change(folder, name, change_):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change_(tensors[name])
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_artifact_does_not_depend_on_how_many_experts_are_worked_at_once(two_blocks, tmp_path, monkeypatch, method):
    folder, step = two_blocks("mixtral"), {**QUANTIZE, "method": method}

    slimmed(folder, tmp_path / "a", [step])
    for module in ("slim", "balance"):
        monkeypatch.setattr(f"compression.{module}.experts_at_once", lambda layer: 3)
    slimmed(folder, tmp_path / "b", [step])

    files = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) == 3
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
