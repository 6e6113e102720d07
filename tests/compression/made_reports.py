"""Reports made up in full: every part that a report may have, of a model as large as one likes, with a stranger's names."""

from __future__ import annotations

from typing import Any

from compression.measured import (
    BenchmarkRow,
    Benchmarks,
    DomainQuality,
    Generation,
    GenerationSample,
    GenerationSide,
    NotMeasured,
    Quality,
    QuantizedOnly,
    RandomDrop,
    Speed,
    SpeedPoint,
)
from compression.plan import FrontierPoint, PlanTrial
from compression.report import BlockRow, LedgerRow, PlanningNote, Report, StudyNote, Verification

STRANGE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\"'"
"""What no page may take for anything but text."""
_STEPS = ({"step": "expert_drop", "criterion": "reap"}, {"step": "quantize", "scheme": "W4A16"})


def full_report(blocks: int = 3, experts: int = 4, name: str = "owner/name") -> Report:
    """Return a report of so many blocks and experts; the second block is gone, and an expert of each other one."""
    return Report(
        model=name, revision="main", profile="custom", steps=_STEPS, bytes_before=8_000_000, bytes_after=2_100_000,
        bytes_planned=2_100_000, target_bytes=2_200_000, memory={"transformers": 6_000_000, "packed_engine": 2_100_000},
        components={"experts": 1_500_000, "attention": 500_000, "embeddings": 100_000, "kv_cache": 0}, quality=_quality(name),
        benchmarks=_benchmarks(name), generation=_generation(name), speed=_speed(),
        not_measured=(NotMeasured(what="quantized_only", reason=f"no room for {name}"),),
        lost=(f"{name} lost much.", "And more."),
        warnings=({"code": "text", "message": f"a word about {name}"},), blocks=_blocks(blocks, experts, name),
        ledger=_ledger(blocks, experts, name), verification=_verification(), study=_study(name), planning=_planning(),
        analysis=None, calibration={"source": name, "tokens": 4096, "content_hash": "ab" * 32, "seed": 0},
        evaluation={"source": name, "tokens": 999, "content_hash": "cd" * 32}, seconds={"studying": 61.25, "compressing": 0.5},
        peak_memory_bytes={"resident": 10**9}, versions={"torch": "2.13.0", "device": name},
        request={"model": name, "recipe": {"steps": list(_STEPS)}},
    )  # fmt: skip


def _quality(name: str) -> Quality:
    found: dict[str, Any] = {"tokens": 999, "loss_before": 2.0, "loss_after": 2.25, "divergence": 0.123, "top1_agreement": 0.87}
    domain = DomainQuality(**{**found, "loss_after": 2.5, "tokens": 400}, name=name)
    drawn = RandomDrop(seed=0, loss=2.75, divergence=0.5, top1_agreement=0.7)
    quantized = QuantizedOnly(loss=2.0625, divergence=0.03, top1_agreement=0.95, bytes=2_600_000)
    return Quality(**found, domains=(domain,), random_drop=drawn, quantized_only=quantized)


def _benchmarks(name: str) -> Benchmarks:
    shared: dict[str, Any] = {
        "task_version": "1",
        "samples": 100,
        "few_shots": 0,
        "stderr_before": 0.04,
        "higher_is_better": True,
    }
    choice = BenchmarkRow(task=name, metric="acc,none", before=0.75, after=0.5, stderr_after=0.05, chance=0.25, **shared)
    written = BenchmarkRow(task="gsm", metric="exact_match,none", before=0.0, after=0.0, stderr_after=None, chance=None, **shared)
    return Benchmarks(rows=(choice, written), harness="0.4", batch_size=8, limit=None, tasks_hash=None, command=f"lm_eval {name}")


def _generation(name: str) -> Generation:
    before, after = (GenerationSide(length=12.0, repetition=share, exact_match=0.5) for share in (0.01, 0.25))
    sample = GenerationSample(prompt=name, expected=None, before=name, after=name)
    return Generation(prompts=4, new_tokens=16, agreement=0.25, before=before, after=after, samples=(sample,), source={})


def _speed() -> Speed:
    points = [
        SpeedPoint(
            model=model, batch_size=size, context_tokens=128, new_tokens=32, rounds=5, prefill_tokens_per_s=1234.5,
            prefill_p50_s=0.1, prefill_p99_s=0.2, decode_tokens_per_s=56.25 * size, step_p50_s=0.02, step_p99_s=0.0401,
            weights_bytes=6_000_000, kv_bytes=4096, peak_bytes=700_000_000,
        )
        for size in (1, 8) for model in ("original", "artifact")
    ]  # fmt: skip
    return Speed(engine="transformers 5", device="cpu", threads=2, dtype="bfloat16", points=tuple(points))


def _blocks(blocks: int, experts: int, name: str) -> tuple[BlockRow, ...]:
    rows: list[BlockRow] = []
    for index in range(blocks):
        gone = index == 1
        kept = None if gone else tuple(e for e in range(experts) if e != index % experts)
        rows.append(
            BlockRow(
                index=index, action="drop" if gone else "keep", index_after=None if gone else index - (index > 1),
                experts_kept=kept, experts_before=experts, moe_layer=None if gone else "keep", cosine=0.5 + index / 1000,
                expert_tokens=tuple(17 * e * (index + 1) for e in range(experts)),
            )
        )  # fmt: skip
    return tuple(rows)


def _ledger(blocks: int, experts: int, name: str) -> tuple[LedgerRow, ...]:
    shared: dict[str, Any] = {
        "scheme": "W4A16", "method_asked": "gptq", "tokens": 900, "tokens_topped_up": 0, "damping": 0.01, "error_before": 0.02,
        "error_after": 0.0125, "error_of": "outputs", "zeros": 0.1, "bits": 4.25,
    }  # fmt: skip
    return tuple(
        LedgerRow(tensor=f"model.layers.{b}.mlp.experts.{e}.{part}.{name}weight", method_used="gptq" if e else "rtn", **shared)
        for b in range(blocks - 1) for e in range(experts - 1) for part in ("gate_proj", "up_proj", "down_proj")
    )  # fmt: skip


def _verification() -> Verification:
    return Verification(
        opened_with="transformers 5.23.0", mode="whole", largest_logit_difference=0.0, tokens=512, tensors_scanned=9,
        rules_of_vllm="not followed",
    )  # fmt: skip


def _study(name: str) -> StudyNote:
    return StudyNote(parts=("count", "gram"), tokens=4096, domains=(name,), reused=False, seconds={})


def _planning() -> PlanningNote:
    points = tuple(FrontierPoint(bytes=10**6 * b, predicted_loss=1.0 / b, steps=_STEPS) for b in range(1, 8))
    trial = PlanTrial(bytes=2_100_000, steps=_STEPS, predicted_loss=0.25, measured_loss=0.2512, standard_error=0.01, chosen=True)
    return PlanningNote(predicted_loss=0.25, trials=(trial,), frontier=points)
