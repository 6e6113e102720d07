"""The demo's tables: what will happen, what did happen, and how long each part took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Return what a plan promises."""
    table = Table("POST /v1/plans", "bytes", title="The plan, before anything is read but names and sizes", title_justify="left")
    table.add_row("model", _number(plan["bytes_before"]))
    table.add_row("target_memory", _number(plan["target_bytes"]))
    table.add_row("artifact", f"[bold]{_number(plan['bytes_after'])}")
    table.add_row("smallest possible", _number(plan["smallest_possible_bytes"]))
    table.add_row("needed by an engine that computes on packed weights", _number(plan["memory"]["packed_engine"]))
    table.add_row("needed by stock transformers, which unpacks experts to bf16", _number(plan["memory"]["transformers"]))
    return table


def report_table(report: Mapping[str, Any]) -> Table:
    """Return what a report says happened."""
    quality, blocks = report["quality"], report["blocks"]
    title = f"{report['ratio']:.2f} times smaller, retention {quality['retention']:.1%}"
    table = Table("GET .../report", "original", "artifact", title=title, title_justify="left")
    kept = [block for block in blocks if block["action"] == "keep"]
    for label, before, after in (
        ("bytes of tensors", _number(report["bytes_before"]), _number(report["bytes_after"])),
        ("share of the original", "1", f"{report['bytes_after'] / report['bytes_before']:.3f}"),
        ("blocks", str(len(blocks)), str(len(kept))),
        ("experts in each", _experts_before(kept), _experts_after(kept)),
        ("schemes", "bf16", ", ".join(sorted({row["scheme"] for row in report["ledger"]})) or "bf16"),
        ("held-out perplexity", f"{quality['perplexity_before']:.2f}", f"{quality['perplexity_after']:.2f}"),
        ("divergence, nats per token", "0", f"{quality['divergence']:.3f}"),
        ("same next token", "1", f"{quality['top1_agreement']:.3f}"),
    ):
        table.add_row(label, before, after)
    seen = report["verification"]
    table.caption = f"opened again with {seen['opened_with']}, largest logit difference {seen['largest_logit_difference']}"
    return table


def seconds_table(seconds: Mapping[str, float]) -> Table:
    """Return how long each part took, and all of them together."""
    table = Table("part", "seconds", title="Where the time went", title_justify="left")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    table.add_section()
    table.add_row("together", f"{sum(seconds.values()):.1f}")
    return table


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _experts_before(kept: list[dict[str, Any]]) -> str:
    return _range_of([block["experts_before"] for block in kept if block["experts_before"]])


def _experts_after(kept: list[dict[str, Any]]) -> str:
    return _range_of([len(block["experts_kept"]) for block in kept if block["experts_kept"]])


def _range_of(counts: list[int]) -> str:
    if not counts:
        return "-"
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
