"""Whole runs that trim: exactly the bytes that were planned, reopened bit for bit, and the report says what went.

``compress`` itself demands both: it raises VerificationFailed where the artifact has other bytes than the plan, or other
logits than the compressing process. What is asserted here is what it reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.errors import ImpossibleStep, UnsupportedArchitecture
from compression.pipeline import compress
from compression.progress import BlockDone, StageStarted
from compression.report import Report
from compression.request import Compression

DROP, GLOBAL = {"step": "expert_drop", "experts_kept": 4}, {"step": "expert_drop", "scope": "global", "experts_kept": 5}
LAYER, BLOCK = {"step": "layer_drop", "layers_dropped": 1}, {"step": "block_drop", "blocks_dropped": 1}
MERGE, SKIP, SPAN = {"step": "expert_merge", "experts_kept": 4}, {"step": "expert_skip"}, {**BLOCK, "selection": "consecutive"}
W4 = {"step": "quantize", "method": "rtn", "scheme": "W4A16", "group_size": 32}
TEXT = {"inline": [f"Line {n}: experts rest while a router sends {n * n} tokens to others." for n in range(400)]}


def run(
    model: Path, out: Path, *steps: dict[str, Any], listener: Any = None, studies: Path | None = None, **fields: Any
) -> Report:
    request = {
        "model": model.as_uri(),
        "recipe": {"steps": list(steps)},
        "calibration": {"source": TEXT, "samples": 6, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [f"Held out {n}." for n in range(300)]}, "samples": 2}},
        **fields,
    }
    return compress(Compression.model_validate(request), model, out, listener, studies=studies)


PORTABLE = {
    "merge": (MERGE,),
    "merge twice, then drop": ({**MERGE, "experts_kept": 6}, MERGE, {**DROP, "experts_kept": 3}),
    "drop, then merge": ({**DROP, "experts_kept": 6}, MERGE),
    "span": (SPAN,),
    "block, span, drop": (BLOCK, SPAN, DROP),
    "lots": ({**DROP, "criterion": "random", "seed": 3},),
    "weights alone": ({**DROP, "criterion": "aimer"},),
    "sets": ({**DROP, "criterion": "hope", "experts_kept": 6}, {**DROP, "criterion": "reconstruction"}),
    "merge, quantized": (MERGE, W4),
}
CUSTOM = {
    "budget": (GLOBAL,),
    "two budgets": (GLOBAL, {**GLOBAL, "experts_kept": 3}),
    "layer": (LAYER,),
    "two layers": (LAYER, LAYER),
    "budget after a layer and a block": (GLOBAL, LAYER, BLOCK),
    "budget by sets": ({**GLOBAL, "criterion": "hope"},),
    "budget by lots": ({**GLOBAL, "criterion": "random"},),
    "almost nobody": ({"step": "expert_drop", "scope": "global", "fraction_dropped": 0.9},),
    "skip": (SKIP,),
    "skip after a drop": (DROP, {**SKIP, "beta": 0.9}),
    "everything": (LAYER, BLOCK, {**MERGE, "experts_kept": 6}, GLOBAL, SKIP, {**W4, "scheme": "W3A16"}),
    "budget, pruned and packed": (GLOBAL, {"step": "prune", "method": "magnitude", "pattern": "2:4"}),
}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("name", PORTABLE)
def test_a_portable_trim_is_as_big_as_planned_and_opens_in_the_stock_class(tiny_model_factory, tmp_path, name, family):
    steps = PORTABLE[name]
    if family == "deepseek_v3":  # its router has groups: counts are even, and blocks behind the dense one are three
        steps = tuple({**step, "experts_kept": 4} if step.get("experts_kept") == 3 else step for step in steps)
        if name == "block, span, drop":
            steps = (BLOCK, DROP)

    report = run(tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", *steps)

    assert report.bytes_after == report.bytes_planned
    assert report.verification.opened_with.startswith("transformers ")
    assert not (tmp_path / "out" / "slimtrim_runtime.py").exists()
    kept = {len(row.experts_kept) for row in report.blocks if row.experts_kept is not None}
    assert kept == {min(step.get("experts_kept", 8) for step in steps)}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("name", CUSTOM)
def test_a_custom_trim_is_as_big_as_planned_and_opens_with_its_own_loader(tiny_model_factory, tmp_path, name, family):
    steps = CUSTOM[name]
    if family == "gpt_oss":
        steps = tuple(step for step in steps if step["step"] not in ("quantize", "prune"))

    report = run(tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", *steps, profile="custom")

    assert report.bytes_after == report.bytes_planned
    kept = [row.experts_kept for row in report.blocks if row.moe_layer == "keep"]
    counts = {len(experts) for experts in kept if experts is not None}
    uneven = len(counts) > 1 or any(row.moe_layer == "drop" or row.skip_beta is not None for row in report.blocks)
    packed = any(step["step"] == "prune" for step in steps)
    assert uneven or packed or "budget" in name  # whose counts may happen to come out even on random weights
    assert report.verification.opened_with.startswith("slimtrim_runtime.py" if uneven or packed else "transformers ")
    assert report.verification.largest_logit_difference == 0.0


def test_the_remote_code_of_an_artifact_gives_the_logits_that_were_measured(tiny_model_factory, tmp_path):
    out = tmp_path / "out"
    report = run(tiny_model_factory("mixtral", dtype="bfloat16"), out, GLOBAL, LAYER, SKIP, profile="custom")

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)

    counts = [block.mlp.experts.num_experts for block in model.get_decoder().layers if hasattr(block.mlp, "experts")]
    assert counts == [len(row.experts_kept) for row in report.blocks if row.experts_kept]
    with pytest.raises((OSError, ValueError), match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize(("family", "spelt"), [("qwen2_moe", "mlp_only_layers"), ("deepseek_v3", "first_k_dense_replace")])
@pytest.mark.parametrize("dense", ["keep", "W4A16"])
def test_dropped_layers_are_told_to_stock_classes_as_dense_ones(tiny_model_factory, tmp_path, family, spelt, dense):
    quantize = [] if family == "qwen2_moe" and dense != "keep" else [{**W4, "dense": dense}]
    report = run(tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", LAYER, *quantize)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    gone = [row.index for row in report.blocks if row.moe_layer == "drop"]
    assert report.bytes_after == report.bytes_planned
    assert config[spelt] == (gone if spelt == "mlp_only_layers" else 2)
    assert any("lost their MoE layer" in line for line in report.lost)


def test_zeros_that_stand_for_layers_are_not_quantized_alone(tiny_model_factory, tmp_path):
    with pytest.raises(ImpossibleStep, match="leave dense out"):
        run(tiny_model_factory("qwen2_moe"), tmp_path / "out", LAYER, {**W4, "dense": "W4A16"})


def test_ids_are_the_sources_own_through_every_step(tiny_model_factory, tmp_path):
    report = run(
        tiny_model_factory("mixtral"), tmp_path / "out", LAYER, BLOCK, DROP, {**GLOBAL, "experts_kept": 3}, profile="custom"
    )

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    places = [row for row in report.blocks if row.action == "keep"]
    assert [row.index_after for row in places] == [0, 1, 2]
    assert config["slimtrim"]["experts"] == [-1 if row.moe_layer == "drop" else len(row.experts_kept or ()) for row in places]
    assert all(set(row.experts_kept or ()) <= set(range(8)) for row in places)
    assert sum(len(row.experts_kept or ()) for row in places) == 2 * 3


def test_merged_experts_are_named_with_those_they_were_folded_from(tiny_model_factory, tmp_path):
    report = run(tiny_model_factory("mixtral"), tmp_path / "out", MERGE)

    for row in report.blocks:
        members = sorted(expert for group in (row.merged or {}).values() for expert in group)
        alone = set(row.experts_kept or ()) - set(row.merged or {})
        assert sorted({*members, *alone}) == list(range(8))
    assert any("folded into others" in line for line in report.lost)


def test_lots_stand_beside_whatever_chose_experts(tiny_model_factory, tmp_path):
    chosen = run(tiny_model_factory("mixtral"), tmp_path / "a", DROP)
    drawn = run(tiny_model_factory("mixtral"), tmp_path / "b", {**DROP, "criterion": "random", "seed": 0})

    assert drawn.quality.random_drop is None
    assert chosen.quality.random_drop is not None
    assert chosen.quality.random_drop.loss == pytest.approx(drawn.quality.loss_after, rel=1e-6)  # the same experts by lot


def test_analyze_adds_tables_and_changes_no_byte(tiny_model_factory, tmp_path):
    model = tiny_model_factory("mixtral")

    report = run(model, tmp_path / "out", {"step": "analyze"})

    assert report.analysis is not None
    assert report.analysis["findings"]
    assert report.bytes_after == report.bytes_before
    assert report.quality.loss_after == report.quality.loss_before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["analysis"] == report.analysis


def test_our_own_custom_artifacts_are_not_compressed_again(tiny_model_factory, tmp_path):
    run(tiny_model_factory("mixtral"), tmp_path / "once", GLOBAL, profile="custom")

    with pytest.raises(UnsupportedArchitecture, match="start from its original"):
        run(tmp_path / "once", tmp_path / "twice", DROP)


class Counting:
    def __init__(self) -> None:
        self.blocks: dict[str, int] = {}
        self._stage = ""

    def on_event(self, event: Any) -> None:
        if isinstance(event, StageStarted):
            self._stage = event.stage
        elif isinstance(event, BlockDone):
            self.blocks[self._stage] = self.blocks.get(self._stage, 0) + 1

    def should_stop(self) -> bool:
        return False


def test_a_second_job_on_the_same_model_and_text_reads_no_weight_to_decide(tiny_model_factory, tmp_path, monkeypatch):
    model, studies = tiny_model_factory("mixtral"), tmp_path / "studies"
    first, second, third = Counting(), Counting(), Counting()

    once = run(model, tmp_path / "a", DROP, listener=first, studies=studies)
    again = run(model, tmp_path / "b", {**DROP, "criterion": "hope"}, listener=second, studies=studies)
    more = run(model, tmp_path / "c", {**DROP, "criterion": "reconstruction"}, listener=third, studies=studies)

    assert (first.blocks["studying"], second.blocks.get("studying"), third.blocks["studying"]) == (4, None, 4)
    assert [note.reused for note in (once.study, again.study, more.study) if note] == [False, True, False]
    same = run(model, tmp_path / "d", DROP, studies=studies)
    assert [row.experts_kept for row in same.blocks] == [row.experts_kept for row in once.blocks]


def test_changed_weights_are_studied_anew_and_copies_are_known_by_content(tiny_model_factory, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model, studies = tmp_path / "model", tmp_path / "studies"
    shutil.copytree(tiny_model_factory("mixtral"), model)
    run(model, tmp_path / "a", DROP, studies=studies)

    shutil.copytree(model, tmp_path / "copy")
    copied = run(tmp_path / "copy", tmp_path / "b", DROP, studies=studies)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"][0, 0] += 1.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    changed = run(model, tmp_path / "c", DROP, studies=studies)

    assert (copied.study.reused, changed.study.reused) == (True, False)  # type: ignore[union-attr]


def test_a_study_on_disk_is_the_study(tiny_model_factory, tmp_path):
    from dataclasses import fields

    from compression.study_store import load, save
    from tests.compression.test_study import IDS_NS, study

    whole = study(tiny_model_factory("deepseek_v3"), "deepseek_v3", IDS_NS, parts=("tokens", "sample", "likeness", "trials"))
    save(whole, tmp_path)

    again = load(tmp_path)

    assert (again.domains, again.parts, again.tokens_M.tolist()) == (whole.domains, whole.parts, whole.tokens_M.tolist())
    assert again.cosine_M.keys() == whole.cosine_M.keys()
    assert torch.equal(again.span_MLL, whole.span_MLL)  # type: ignore[arg-type]
    for block, statistics in whole.experts.items():
        for entry in fields(statistics):
            ours, theirs = getattr(statistics, entry.name), getattr(again.experts[block], entry.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else type(ours) is type(theirs), entry.name
        assert again.experts[block].sample.router.keys() == statistics.sample.router.keys()
        assert torch.equal(again.experts[block].sample.gram_SEE, statistics.sample.gram_SEE)
        assert torch.equal(again.experts[block].likeness.tau_P, statistics.likeness.tau_P)
    for block, trials in whole.trials.items():
        assert again.trials[block].settings == trials.settings
        assert all(torch.equal(again.trials[block].error[name], error) for name, error in trials.error.items())
    numbers = json.loads((tmp_path / "study.json").read_text())
    assert numbers["blocks"][1]["count"] == whole.experts[1].count_ME.tolist()


def test_as_few_experts_everywhere_as_no_token_can_use_need_the_loader(tiny_model_factory, tmp_path):
    few = {"step": "expert_drop", "scope": "global", "experts_kept": 1, "criterion": "random", "seed": 0}

    report = run(tiny_model_factory("mixtral", num_hidden_layers=1), tmp_path / "out", few, profile="custom")

    assert [row.experts_kept and len(row.experts_kept) for row in report.blocks] == [1]
    assert report.verification.opened_with.startswith("slimtrim_runtime.py")


@pytest.mark.parametrize("family", ["qwen3_omni_moe", "ernie4_5_moe", "laguna", "hunyuan_v1_moe", "minimax_m2", "granitemoe"])
def test_routers_of_every_kind_are_asked_again(tiny_model_factory, tmp_path, family):
    step = {"step": "expert_drop", "criterion": "reconstruction", "experts_kept": 6}

    report = run(tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", step, studies=tmp_path / "studies")

    assert report.bytes_after == report.bytes_planned


def test_a_config_that_names_its_dtype_on_top_alone_is_studied(tiny_model_factory, tmp_path):
    import shutil

    shutil.copytree(tiny_model_factory("qwen3_vl_moe", dtype="bfloat16"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    config["dtype"] = "bfloat16"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    report = run(tmp_path / "model", tmp_path / "out", DROP, studies=tmp_path / "studies")

    assert report.study is not None
