"""A run that is over -> its report: every figure taken from where it was measured, none computed here."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
from typing import TYPE_CHECKING, Any

import compressed_tensors
import torch
import transformers

from compression.analysis.tables import analysis_tables
from compression.calibration import TokenSet
from compression.recipe import Analyze
from compression.report import Beside, BlockRow, PlanningNote, Report, StudyNote, worst_first

if TYPE_CHECKING:
    from compression.pipeline import Run

_LONGEST_TEXTS = 4000
"""Bytes of text given in a request that the report repeats."""


def report_of(run: Run) -> Report:
    """Put together what happened."""
    blocks, ledger, measured = _block_rows(run), tuple(run.ledger), run.measured
    return Report(
        model=run.request.model,
        revision=run.request.revision,
        profile=run.plan.profile,
        steps=tuple(run.plan.steps),
        bytes_before=run.plan.bytes_before,
        bytes_after=run.bytes_after,
        bytes_planned=run.bytes_planned,
        target_bytes=run.plan.target_bytes,
        memory=dict(run.plan.memory),
        components=dict(run.plan.components),
        quality=measured.quality,
        benchmarks=measured.benchmarks,
        generation=measured.generation,
        speed=measured.speed,
        not_measured=tuple(run.not_measured),
        lost=worst_first(measured.quality, blocks, ledger, beside=_beside(run)),
        warnings=tuple(run.warnings),
        blocks=blocks,
        ledger=ledger,
        verification=run.verification,
        study=_study_note(run),
        planning=_planning_note(run),
        analysis=_analysis(run),
        calibration=None if run.calibration is None else _provenance(run.calibration),
        evaluation=_provenance(run.evaluation),
        seconds=run.seconds,
        peak_memory_bytes=_peak_memory(),
        versions=environment_of(run.device),
        request=without_long_texts(run.request.model_dump(mode="json")),
        resumed=run.finished.notes(),
    )


def without_long_texts(value: Any) -> Any:
    """Return a request, where long texts of its own are told by their size and hash; such a request is refused, not misread."""
    if isinstance(value, dict):
        return {name: without_long_texts(inner) for name, inner in value.items()}
    if not isinstance(value, list):
        return value
    text = json.dumps(value, ensure_ascii=False).encode()
    if len(text) > _LONGEST_TEXTS and not any(isinstance(item, dict) and "step" in item for item in value):
        return {"left_out": len(value), "json_bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    return [without_long_texts(inner) for inner in value]


def _beside(run: Run) -> Beside:
    return Beside(run.measured.benchmarks, run.measured.generation, tuple(run.not_measured))


def _analysis(run: Run) -> dict[str, Any] | None:
    if run.study is None or not any(isinstance(step, Analyze) for step in run.steps):
        return None
    return analysis_tables(run.study)


def _planning_note(run: Run) -> PlanningNote | None:
    if run.plan.predicted_loss is None:
        return None
    return PlanningNote(predicted_loss=run.plan.predicted_loss, trials=run.plan.trials, frontier=run.plan.frontier)


def _study_note(run: Run) -> StudyNote | None:
    if run.study is None:
        return None
    return StudyNote(
        parts=tuple(sorted(run.study.parts)),
        tokens=int(run.study.tokens_M.sum()),
        domains=run.study.domains,
        reused=run.study_reused,
        seconds={part: round(seconds, 3) for part, seconds in run.study.seconds.items()},
    )


def _block_rows(run: Run) -> tuple[BlockRow, ...]:
    places = {source: index for index, source in enumerate(run.cuts.blocks)}
    rows: list[BlockRow] = []
    for block in run.whole.blocks:
        statistics = run.study.experts.get(block) if run.study is not None else None
        seen = statistics if statistics is not None and statistics.tokens else None
        before = run.whole.experts.get(block)
        lost_layer = block in run.cuts.layers_dropped
        rows.append(
            BlockRow(
                index=block,
                action="keep" if block in places else "drop",
                index_after=places.get(block),
                experts_kept=run.cuts.experts.get(block),
                experts_before=len(before) if before is not None else None,
                moe_layer=("drop" if lost_layer else "keep") if before is not None and block in places else None,
                merged=dict(run.cuts.merged[block]) if block in run.cuts.merged else None,
                skip_beta=run.cuts.skip.get(block),
                cosine=run.study.cosine(block) if run.study is not None and block in run.study.cosine_M else None,
                layer_cosine=seen.layer_cosine if seen is not None else None,
                expert_tokens=tuple(int(n) for n in seen.total("count").tolist()) if seen is not None else None,
            )
        )
    return tuple(rows)


def _provenance(tokens: TokenSet) -> dict[str, Any]:
    return {**tokens.description, "tokens": tokens.tokens, "content_hash": tokens.content_hash}


def _peak_memory() -> dict[str, int]:
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["accelerator"] = torch.cuda.max_memory_allocated()
    return peak


def environment_of(device: torch.device) -> dict[str, str]:
    """Return what may change a rounding: versions, device and threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed_tensors": compressed_tensors.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
