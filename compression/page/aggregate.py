"""What the page draws that no single field of the report holds: the ledger by lever and by block, and each block's experts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
LONGEST_LEDGER = 2000
"""Rows that a page carries; a longer ledger is told by its sums, and report.json has the rows."""
_BLOCK = re.compile(r"\.(\d+)\.")


def page_data(report: Data) -> Data:
    """Return what a page embeds: the report, its ledger left out where it is long, and the sums that the page shows."""
    ledger: list[Data] = report["ledger"]
    whole = len(ledger) <= LONGEST_LEDGER
    sums = {
        "ledger_rows": len(ledger),
        "ledger_is_whole": whole,
        "levers": _grouped(ledger, _lever),
        "errors_by_block": _grouped([row for row in ledger if _BLOCK.search(row["tensor"])], _block),
    }
    return {**report, "ledger": ledger if whole else [], "page": sums}


def _grouped(ledger: Iterable[Data], key: Callable[[Data], Data]) -> list[Data]:
    groups: dict[tuple[Any, ...], list[Data]] = defaultdict(list)
    for row in ledger:
        groups[tuple(key(row).items())].append(row)
    sums = [{**dict(names), **_sums(rows)} for names, rows in groups.items()]
    return sorted(sums, key=lambda row: (row.get("block", 0), -row["mean_error"]))


def _sums(rows: list[Data]) -> Data:
    errors = [row["error_after"] for row in rows]
    plain = [row["error_before"] for row in rows]
    return {
        "weights": len(rows),
        "mean_error": sum(errors) / len(rows),
        "largest_error": max(errors),
        "mean_error_plain": sum(plain) / len(rows),
        "mean_bits": sum(row["bits"] for row in rows) / len(rows),
    }


def _lever(row: Data) -> Data:
    name = row["tensor"]
    owner = "shared experts" if "shared_expert" in name else "experts" if "expert" in name else "attention and other"
    return {"scheme": row["scheme"], "method": row["method_used"], "of": owner, "error_of": row["error_of"].replace("_", " ")}


def _block(row: Data) -> Data:
    match = _BLOCK.search(row["tensor"])
    assert match is not None, "rows without a block are left out"
    return {"block": int(match[1])}
