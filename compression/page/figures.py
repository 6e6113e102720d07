"""The plots of one report, from its figures."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from compression.page.axes import in_bytes, short
from compression.page.heatmap import Colour, heat_map
from compression.page.plots import Bar, Kind, Mark, bar_chart, frontier_plot, measured_plot
from compression.plan import FrontierPoint

_KEPT, _MERGED, _GONE, _NONE = (62, 122, 150, 255), (214, 158, 46, 255), (200, 90, 70, 90), (128, 128, 128, 20)
_KINDS: dict[str, Kind] = {"original": "original", "artifact": "artifact"}
_WORST = 24
"""Bars of blocks at most; the table has them all."""


def figures_of(report: dict[str, Any]) -> dict[str, Markup]:
    """Return every plot that the report has figures for; an empty one where it has none."""
    errors = report["page"]["errors_by_block"]
    worst = sorted(enumerate(errors), key=lambda pair: -pair[1]["mean_error"])[:_WORST]
    return {
        "size": _size(report),
        "errors": bar_chart(
            "Mean relative error of its weights", "by block of the artifact, the worst first",
            [Bar(f"block {row['block']}", row["mean_error"], f"{100 * row['mean_error']:.3f}%",
                 source=f"page.errors_by_block.{place}.mean_error") for place, row in worst],
        ),
        "memory": bar_chart("Memory needed", "bytes, key-value cache and overhead included", [
            Bar(f"{name.replace('_', ' ')}", value, in_bytes(value), source=f"memory.{name}")
            for name, value in report["memory"].items()
        ]),
        "decode": _speed(report, "decode_tokens_per_s", "Decode", "tokens per second"),
        "prefill": _speed(report, "prefill_tokens_per_s", "Prefill", "tokens per second"),
        "fate": _fate(report["blocks"]),
        "usage": _usage(report["blocks"]),
    }  # fmt: skip


def _size(report: dict[str, Any]) -> Markup:
    quality, planning, target = report["quality"], report.get("planning"), report["target_bytes"]
    if planning is not None:
        points = [FrontierPoint.model_validate(point) for point in planning["frontier"]]
        chosen = (report["bytes_after"], planning["predicted_loss"])
        return frontier_plot(points, chosen=chosen, target_bytes=target, original_bytes=report["bytes_before"])
    marks = [
        Mark("original", report["bytes_before"], quality["loss_before"], "original"),
        Mark("this artifact", report["bytes_after"], quality["loss_after"], "artifact"),
    ]
    if (quantized := quality["quantized_only"]) is not None:
        marks.append(Mark("quantized only", quantized["bytes"], quantized["loss"], "other"))
    return measured_plot(marks, target_bytes=target)


def _speed(report: dict[str, Any], field: str, title: str, unit: str) -> Markup:
    points = (report.get("speed") or {"points": []})["points"]
    return bar_chart(title, unit, [
        Bar(f"{point['model']}, batch {point['batch_size']}", point[field], short(point[field]),
            _KINDS.get(point["model"], "other"), f"speed.points.{place}.{field}")
        for place, point in enumerate(points)
    ])  # fmt: skip


def _fate(blocks: list[dict[str, Any]]) -> Markup:
    width = max((row["experts_before"] or 0 for row in blocks), default=0)
    rows = [[_colour(row, expert) for expert in range(width)] for row in blocks]
    what = "kept in blue, folded into another in yellow, gone in red, no expert in grey"
    return heat_map("What became of every expert", what, rows, kind="fate", labels=[str(row["index"]) for row in blocks])


def _colour(row: dict[str, Any], expert: int) -> Colour:
    if expert >= (row["experts_before"] or 0):
        return _NONE
    if row["action"] == "drop" or row["moe_layer"] == "drop":
        return _GONE
    kept = row["experts_kept"]
    if kept is None or expert in kept:
        return _KEPT
    return _MERGED if any(expert in group for group in (row["merged"] or {}).values()) else _GONE


def _usage(blocks: list[dict[str, Any]]) -> Markup:
    seen = [row for row in blocks if row["expert_tokens"]]
    width = max((len(row["expert_tokens"]) for row in seen), default=0)
    rows = [[_shade(row["expert_tokens"], expert) for expert in range(width)] for row in seen]
    what = "calibration tokens per expert, darker for more; each block by its own busiest expert"
    return heat_map("Expert usage", what, rows, kind="usage", labels=[str(row["index"]) for row in seen])


def _shade(tokens: list[int], expert: int) -> Colour:
    share = tokens[expert] / max(*tokens, 1) if expert < len(tokens) else 0.0
    return (62, 122, 150, round(20 + 235 * share))
