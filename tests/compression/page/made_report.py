"""Reports with every part filled, of any size, and with a name of one's choice wherever a stranger writes one."""

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
from compression.plan import FrontierPoint
from compression.report import BlockRow, LedgerRow, PlanningNote, Report, Verification


def made_report(name: str = "owner/name", *, blocks: int = 3, experts: int = 4, **changes: Any) -> Report:
    """Return a report of a model that was trimmed and quantized."""
    paired = {"tokens": 1000, "loss_before": 2.0, "loss_after": 2.1, "divergence": 0.05, "top1_agreement": 0.9}
    quality = Quality(
        **paired,
        domains=(DomainQuality(name=name, **paired),),
        random_drop=RandomDrop(loss=3.0, divergence=1.0, top1_agreement=0.5, seed=0),
        quantized_only=QuantizedOnly(loss=2.05, divergence=0.02, top1_agreement=0.95, bytes=2000),
    )
    task = BenchmarkRow(
        task=name, metric="acc,none", task_version="1", higher_is_better=True, samples=100, few_shots=0, before=0.6, after=0.5,
        stderr_before=0.05, stderr_after=None, chance=0.25,
    )  # fmt: skip
    side = GenerationSide(length=9.0, repetition=0.1, exact_match=None)
    sample = GenerationSample(prompt=name, expected=None, before=name, after=name)
    point = SpeedPoint(
        model="artifact", batch_size=1, context_tokens=8, new_tokens=8, rounds=3, prefill_tokens_per_s=100.0, prefill_p50_s=0.1,
        prefill_p99_s=0.2, decode_tokens_per_s=20.0, step_p50_s=0.05, step_p99_s=0.06, weights_bytes=9, kv_bytes=9, peak_bytes=9,
    )  # fmt: skip
    plain: dict[str, Any] = {
        "model": name, "revision": name, "profile": "portable", "bytes_before": 4000, "bytes_after": 1000, "bytes_planned": 1000,
        "steps": ({"step": "quantize", "method": "gptq", "group_size": None},), "target_bytes": 1200, "lost": (name,),
        "memory": {"transformers": 4321, "packed_engine": 1234}, "components": {"experts": 900, "other": 100},
        "quality": quality, "warnings": ({"code": "text", "message": name},), "calibration": {"source": name}, "evaluation": {},
        "benchmarks": Benchmarks(rows=(task,), harness="1", batch_size=1, limit=None, tasks_hash=None, command=name),
        "generation": Generation(prompts=1, new_tokens=9, agreement=0.5, before=side, after=side, samples=(sample,), source={}),
        "speed": Speed(engine="e", device="cpu", threads=1, dtype="bfloat16", points=(point,)),
        "not_measured": (NotMeasured(what="benchmarks", reason=name),), "seconds": {"compressing": 1.5},
        "blocks": tuple(_block(index, experts) for index in range(blocks)),
        "ledger": tuple(_row(f"{name}.{b}.experts.{e}.{part}") for b in range(blocks) for e in range(experts) for part in "gud"),
        "verification": Verification(
            opened_with="transformers 5", mode="whole", largest_logit_difference=0.0, tokens=512, tensors_scanned=9
        ),
        "planning": PlanningNote(
            predicted_loss=0.04, trials=(), frontier=tuple(
                FrontierPoint(bytes=size, predicted_loss=loss, steps=()) for size, loss in ((900, 0.4), (4000, 0.0))
            ),
        ),
        "peak_memory_bytes": {}, "versions": {"torch": name},
    }  # fmt: skip
    return Report(**{**plain, **changes})


def _block(index: int, experts: int) -> BlockRow:
    kept = tuple(range(experts - 2))
    return BlockRow(
        index=index, action="keep", index_after=index, experts_kept=kept, experts_before=experts, moe_layer="keep",
        merged={0: (0, experts - 1)}, cosine=0.9, expert_tokens=tuple(7 * e % 1009 for e in range(experts)),
    )  # fmt: skip


def _row(tensor: str) -> LedgerRow:
    return LedgerRow(
        tensor=tensor, scheme="W4A16", method_asked="gptq", method_used="gptq", tokens=900, tokens_topped_up=0, damping=0.01,
        error_before=0.02, error_after=0.01, error_of="outputs", zeros=0.1, bits=4.5,
    )  # fmt: skip
