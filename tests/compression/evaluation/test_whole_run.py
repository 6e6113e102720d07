"""A run evaluated in every way: the figures are those that others get from the artifact, and add up."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from compression.calibration import load_evaluation
from compression.progress import BlockDone
from compression.request import Perplexity
from tests.compression.evaluation.conftest import KINDS, Evaluated


def test_perplexity_is_what_stock_transformers_computes_on_the_artifact(evaluated: Evaluated):
    settings = Perplexity.model_validate({"source": KINDS, "samples": 8})
    ids_NS = load_evaluation(settings, evaluated.original, sequence_length=32).ids_NS

    for folder, reported in (
        (evaluated.original, evaluated.report.quality.perplexity_before),
        (evaluated.artifact, evaluated.report.quality.perplexity_after),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [cross_entropy(model(ids_S[None]).logits[0, :-1].float(), ids_S[1:]).item() for ids_S in ids_NS]
        # 0.1 %: other batches, so other orders of adding in float32; found were 1e-6 and less.
        assert reported == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)


def test_the_command_in_the_report_gives_the_figures_in_the_report(evaluated: Evaluated, tasks: Path, tmp_path: Path):
    benchmarks = evaluated.report.benchmarks
    assert benchmarks is not None
    environment = {**os.environ, "SLIMTRIM_TASKS_DIR": str(tasks), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    command = f"{benchmarks.command} --output_path {tmp_path}"
    subprocess.run(command, shell=True, cwd=evaluated.artifact, env=environment, check=True, capture_output=True)

    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert {(row.task, row.metric): row.after for row in benchmarks.rows} == {
        (task, metric): results[task][metric]
        for task, metric in [
            ("tiny_choice", "acc,none"),
            ("tiny_choice", "acc_norm,none"),
            ("tiny_write", "exact_match,none"),
        ]
    }


def test_rows_say_what_guessing_scores_and_on_how_many_samples(evaluated: Evaluated):
    assert evaluated.report.benchmarks is not None
    rows = {row.metric: row for row in evaluated.report.benchmarks.rows}

    # Two, three and four answers in turn.
    assert rows["acc,none"].chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert rows["exact_match,none"].chance is None
    assert {(row.samples, row.few_shots) for row in rows.values()} == {(6, 0)}
    assert rows["acc,none"].task_version == "1.5"


def test_kinds_of_text_add_up_to_the_whole(evaluated: Evaluated):
    quality = evaluated.report.quality

    assert sorted(row.name for row in quality.domains) == ["tale", "turned"]
    assert sum(row.tokens for row in quality.domains) == quality.tokens
    for figure in ("loss_before", "loss_after", "divergence", "top1_agreement"):
        total = sum(row.tokens * getattr(row, figure) for row in quality.domains)
        assert total / quality.tokens == pytest.approx(getattr(quality, figure), rel=1e-12)
    assert [row.retention for row in quality.domains] == sorted(row.retention for row in quality.domains)


def test_the_same_quantization_without_the_trims_is_bigger_and_nearer_to_the_original(evaluated: Evaluated):
    alone, quality = evaluated.report.quality.quantized_only, evaluated.report.quality
    assert alone is not None

    assert evaluated.report.bytes_after < alone.bytes < evaluated.report.bytes_before
    assert 0 < alone.divergence < quality.divergence
    assert {path.name for path in evaluated.artifact.parent.iterdir() if "quantized-only" in path.name} == set()


def test_what_was_written_is_counted_for_both(evaluated: Evaluated):
    generation = evaluated.report.generation
    assert generation is not None

    assert (generation.prompts, len(generation.samples)) == (3, 3)
    for side in (generation.before, generation.after):
        assert 0 < side.length <= 8
        assert side.exact_match in (0.0, 1.0)


def test_a_point_per_model_and_batch_size_with_the_cache_that_the_tokens_need(evaluated: Evaluated):
    speed = evaluated.report.speed
    assert speed is not None

    assert [(point.model, point.batch_size) for point in speed.points] == [("original", 2), ("artifact", 2)]
    for point in speed.points:
        # 4 blocks, key and value of 2 heads of 16 float32 numbers, for 16 + 3 tokens of 2 sequences.
        assert point.kv_bytes == 4 * 2 * 2 * 16 * 4 * (16 + 3) * 2
        assert point.weights_bytes >= evaluated.report.bytes_after
        assert point.prefill_p50_s <= point.prefill_p99_s
        assert point.step_p50_s <= point.step_p99_s


def test_progress_never_goes_back_and_names_model_and_task(evaluated: Evaluated):
    told = [event for event in evaluated.events if isinstance(event, BlockDone) and event.stage == "evaluating"]

    fractions = [event.fraction for event in told]
    assert fractions == sorted(fractions)
    for text in ("original: benchmarks tiny_choice, tiny_write", "artifact: 3 prompts", "artifact: speed at batch size 2"):
        assert any(event.message.startswith(text) for event in told)


def test_what_passes_by_is_not_in_the_artifact_and_what_stays_is(evaluated: Evaluated):
    stored = json.loads((evaluated.artifact / "report.json").read_text())

    assert "speed" not in stored
    assert stored["benchmarks"]["rows"]
    assert str(evaluated.artifact) not in json.dumps(stored)
