"""Recipe "auto", whole runs: within the target, the same as its steps written out, from one study for every target."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression.auto import pricing_text
from compression.calibration import load_calibration
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.errors import TargetUnreachable
from compression.pipeline import compress
from compression.plan import make_plan
from compression.planner.known import recall
from compression.progress import BlockDone, PlanSettled, StageStarted
from compression.request import Calibration, Compression
from tests.compression.heard import Heard
from tests.compression.test_pipeline import WORDS, tensor_bytes

FAMILIES = ("deepseek_v3",)  # dense blocks, shared experts, groups, latent attention; the job over HTTP is of a Qwen2-MoE


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS.split()) for _ in range(words))


CALIBRATION = {"source": {"inline": [prose(1, 6000)]}, "samples": 8, "sequence_length": 32}


def a_request(folder: Path, target: int | None, **more) -> Compression:
    return Compression.model_validate(
        {
            "model": folder.as_uri(),
            "target_memory": target,
            "calibration": CALIBRATION,
            "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
            **more,
        }
    )


def checkpoint(folder: Path):
    return read_checkpoint(FolderFiles(folder))


class Model:
    """A tiny model, and the folder in which its studies are kept."""

    def __init__(self, folder: Path, studies: Path) -> None:
        self.folder, self.studies = folder, studies
        self.bytes = tensor_bytes(folder)

    def compressed(self, out: Path, share: float, **more):
        request = a_request(self.folder, round(share * self.bytes), **more)
        return compress(request, self.folder, out, studies=self.studies)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tiny_model_factory, tmp_path_factory):
    return Model(tiny_model_factory(request.param, dtype="bfloat16"), tmp_path_factory.mktemp("studies"))


def contents(folder: Path) -> dict[str, bytes]:
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("profile", "share"), [("portable", 0.45), ("custom", 0.3), ("custom", 0.12)])
def test_the_artifact_fits_and_is_as_big_as_planned_and_opens_as_it_was_computed(model, tmp_path, profile, share):
    report = model.compressed(tmp_path / "out", share, profile=profile)

    assert tensor_bytes(tmp_path / "out") == report.bytes_after == report.bytes_planned <= share * model.bytes
    assert report.verification.largest_logit_difference == 0.0
    assert report.planning is not None
    assert [trial.chosen for trial in report.planning.trials].count(True) == 1
    assert next(trial for trial in report.planning.trials if trial.chosen).steps == report.steps


def test_the_steps_written_out_give_the_same_artifact(model, tmp_path):
    report = model.compressed(tmp_path / "auto", 0.4, profile="custom")
    steps = {"steps": list(report.steps)}

    again = model.compressed(tmp_path / "written", 0.4, profile="custom", recipe=steps)

    assert contents(tmp_path / "written") == contents(tmp_path / "auto")
    assert again.planning is None
    assert again.quality == report.quality


def test_one_study_serves_every_target_and_answers_for_the_plan_before_the_job(model, tmp_path):
    first = model.compressed(tmp_path / "first", 0.5)
    second = model.compressed(tmp_path / "second", 0.3)

    assert second.study is not None
    assert second.study.reused
    request = a_request(model.folder, round(0.5 * model.bytes))
    known = recall(model.studies, request, None, checkpoint(model.folder))
    plan = make_plan(request, checkpoint(model.folder), known)
    assert not plan.provisional
    assert plan.frontier == first.planning.frontier
    assert first.planning.trials[0].steps == plan.steps


def test_progress_goes_forward_through_every_sweep_and_the_plan_is_told_once(model, tmp_path):
    heard = Heard()

    report = compress(a_request(model.folder, round(0.35 * model.bytes)), model.folder, tmp_path / "out", heard)

    fractions = [event.fraction for event in heard.events if isinstance(event, StageStarted | BlockDone)]
    assert fractions == sorted(fractions)
    stages = [event.stage for event in heard.events if isinstance(event, StageStarted)]
    assert stages == ["resolving", "studying", "planning", "compressing", "evaluating", "verifying"]
    assert [event.plan["steps"] for event in heard.events if isinstance(event, PlanSettled)] == [list(report.steps)]


def test_without_a_study_the_plan_is_provisional_and_keeps_the_target(model):
    plan = make_plan(a_request(model.folder, model.bytes // 2), checkpoint(model.folder))

    assert plan.provisional
    assert plan.bytes_after <= model.bytes // 2
    assert "usual_prices" in {warning.code for warning in plan.warnings}
    assert len(plan.frontier) >= 12


def test_a_target_that_holds_the_model_leaves_every_tensor_as_it_is_and_says_so(model, tmp_path):
    report = model.compressed(tmp_path / "out", 1.0)

    assert contents(tmp_path / "out") == contents(model.folder)
    assert report.steps == ()
    assert "untouched" in {warning["code"] for warning in report.warnings}
    assert report.quality.divergence == 0.0


def test_a_target_below_the_smallest_is_refused_with_the_smallest_which_is_accepted(model):
    with pytest.raises(TargetUnreachable) as refusal:
        make_plan(a_request(model.folder, 1000), checkpoint(model.folder))

    smallest = int(refusal.value.details["smallest_possible_bytes"])
    plan = make_plan(a_request(model.folder, smallest), checkpoint(model.folder))
    assert plan.bytes_after == smallest == plan.smallest_possible_bytes
    with pytest.raises(TargetUnreachable):
        make_plan(a_request(model.folder, smallest - 1), checkpoint(model.folder))


def test_the_target_counts_the_cache_and_the_overhead(model):
    serving = {"context_tokens": 64, "batch_size": 2, "overhead": 12345}
    bare = make_plan(a_request(model.folder, model.bytes // 2), checkpoint(model.folder))
    target = bare.bytes_after  # to the byte what fits without a cache
    plan = make_plan(a_request(model.folder, target, serving=serving), checkpoint(model.folder))

    assert plan.bytes_after <= target
    assert plan.components["kv_cache"] > 0
    assert plan.components["overhead"] == 12345
    assert plan.tensor_bytes < bare.tensor_bytes


def test_prices_are_taken_on_windows_that_are_no_samples(tiny_tokenizer):
    tokens = load_calibration(Calibration.model_validate(CALIBRATION), tiny_tokenizer)

    text = pricing_text(tokens)

    samples = {tuple(row) for row in tokens.ids_NS.tolist()}
    priced, tried = ({tuple(row) for row in ids_NS.tolist()} for ids_NS in (text.priced_NS, text.tried_NS))
    assert text.note is None
    assert not samples & (priced | tried)
    assert not priced & tried


def test_a_text_without_more_windows_prices_on_its_samples_and_says_so(tiny_tokenizer):
    short = {**CALIBRATION, "source": {"inline": [prose(1, 200)]}}
    tokens = load_calibration(Calibration.model_validate(short), tiny_tokenizer)

    text = pricing_text(tokens)

    assert text.note is not None
    assert len(text.priced_NS)
    assert len(text.tried_NS)
