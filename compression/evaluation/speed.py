"""Times of single rounds and steps -> one point: medians, 99th percentiles and rates."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

from compression.measured import SpeedPoint, Which
from compression.request import SpeedSettings


def point(model: Which, batch_size: int, settings: SpeedSettings, timed: dict[str, Any]) -> SpeedPoint:
    """Return what ``timing.py`` measured of a model at a batch size, with rates over the whole batch from the medians."""
    prefill, step = median(timed["prefills"]), median(timed["steps"])
    return SpeedPoint(
        model=model,
        batch_size=batch_size,
        context_tokens=settings.context_tokens,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        prefill_tokens_per_s=batch_size * settings.context_tokens / prefill,
        prefill_p50_s=prefill,
        prefill_p99_s=p99(timed["prefills"]),
        decode_tokens_per_s=batch_size / step,
        step_p50_s=step,
        step_p99_s=p99(timed["steps"]),
        weights_bytes=timed["weights_bytes"],
        kv_bytes=timed["kv_bytes"],
        peak_bytes=timed["peak_bytes"],
    )


def p99(times: list[float]) -> float:
    """Return the 99th percentile, interpolated between the times measured; of fewer than a hundred, close to the slowest."""
    return quantiles(times, n=100, method="inclusive")[98] if len(times) > 1 else times[0]
