"""What the page shows that the report has only row by row: sums over the ledger, and what became of every expert.

It is embedded in the page beside the report, under ``page``, so that these figures too lead back to data.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LEDGER_ROWS = 2000
"""A ledger of more rows is not in the page; ``page.ledger`` and ``page.errors`` are what it comes to."""
_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.|\[(\d+)\]$")
NONE, DROPPED, MERGED, KEPT = "-", "x", "m", "k"
"""What became of an expert, a letter each; an expert of a dropped block or MoE layer is dropped."""

Json = dict[str, Any]


def derive(report: Json) -> Json:
    """Return the tables that the page adds to the report."""
    return {
        "change": report["quality"]["perplexity_after"] / report["quality"]["perplexity_before"] - 1,
        "differing": 1 - report["quality"]["top1_agreement"],
        "saved": 1 - report["bytes_after"] / report["bytes_before"],
        "levers": _levers(report["quality"]),
        "ledger": _ledger(report["ledger"]),
        "ledger_rows": len(report["ledger"]),
        "errors": _errors(report["ledger"]),
        "experts": _experts(report["blocks"], _bits(report["ledger"])),
    }


def _levers(quality: Json) -> list[Json]:
    """Say what each lever has cost in loss, where the model with one of them alone was measured."""
    whole = quality["loss_after"] - quality["loss_before"]
    levers = [{"lever": "everything", "loss": whole}]
    if (alone := quality.get("quantized_only")) is not None:
        quantized = alone["loss"] - quality["loss_before"]
        levers = [
            {"lever": "quantization alone", "loss": quantized},
            {"lever": "what the trims add", "loss": whole - quantized},
            *levers,
        ]
    if (lots := quality.get("random_drop")) is not None:
        levers.append(
            {"lever": "the same trims, experts drawn by lot, nothing slimmed", "loss": lots["loss"] - quality["loss_before"]}
        )
    return levers


def _ledger(rows: Sequence[Json]) -> list[Json]:
    """Sum the ledger up by scheme and method, the largest error first."""
    groups: defaultdict[tuple[str, str, str], list[Json]] = defaultdict(list)
    for row in rows:
        groups[row["scheme"], row["method_used"], row["error_of"]].append(row)
    told = [
        {
            "scheme": scheme,
            "method": method,
            "error_of": error_of,
            "weights": len(group),
            "instead": sum(row["method_used"] != row["method_asked"] for row in group),
            "error_before": _mean(row["error_before"] for row in group),
            "error_after": _mean(row["error_after"] for row in group),
            "worst": max(row["error_after"] for row in group),
            "bits": _mean(row["bits"] for row in group),
            "zeros": _mean(row["zeros"] for row in group),
        }
        for (scheme, method, error_of), group in groups.items()
    ]
    return sorted(told, key=lambda row: -row["error_after"])


def _errors(rows: Sequence[Json]) -> list[Json]:
    """Return the mean error of each block of the artifact, and its worst weight."""
    blocks: defaultdict[int, list[Json]] = defaultdict(list)
    for row in rows:
        if (block := _BLOCK.search(row["tensor"])) is not None:
            blocks[int(block[1])].append(row)
    return [
        {
            "block": block,
            "error_before": _mean(row["error_before"] for row in group),
            "error_after": _mean(row["error_after"] for row in group),
            "worst": max(group, key=lambda row: row["error_after"])["tensor"],
        }
        for block, group in sorted(blocks.items())
    ]


def _bits(rows: Sequence[Json]) -> Mapping[tuple[int, int], float]:
    """Return the mean bits per entry of each expert, by its block and place in the artifact."""
    found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        block, expert = _BLOCK.search(row["tensor"]), _EXPERT.search(row["tensor"])
        if block is not None and expert is not None:
            found[int(block[1]), int(expert[1] or expert[2])].append(row["bits"])
    return {place: _mean(bits) for place, bits in found.items()}


def _experts(blocks: Sequence[Json], bits: Mapping[tuple[int, int], float]) -> list[Json]:
    """Return what became of every expert of the source, block by block: a letter each, and its bits where they were changed."""
    rows: list[Json] = []
    for block in blocks:
        count = block["experts_before"] or len(block["expert_tokens"] or ())
        gone = block["action"] == "drop" or block.get("moe_layer") == "drop"
        kept = [] if gone else (block["experts_kept"] or [])
        folded = {expert for group in (block.get("merged") or {}).values() for expert in group}
        places = {expert: place for place, expert in enumerate(kept)}
        fate = "".join(KEPT if e in places else MERGED if e in folded else DROPPED for e in range(count))
        own = [bits.get((block["index_after"], places[e])) if e in places else None for e in range(count)]
        rows.append({"block": block["index"], "fate": fate, "bits": own})
    return rows


def _mean(values: Iterable[float]) -> float:
    taken = list(values)
    return sum(taken) / len(taken)
