"""What the harness measured of two models -> rows, and the harness's own command line that gives the artifact's figures."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression.measured import BenchmarkRow

TASKS_VARIABLE = "SLIMTRIM_TASKS_DIR"


def rows_of(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[BenchmarkRow, ...]:
    """Return a row per task and metric, the worst retention first, and those that have none last."""
    found = {(row["task"], row["metric"]): row for row in after}
    rows = [_row(row, found[row["task"], row["metric"]]) for row in before]
    return tuple(sorted(rows, key=lambda row: (row.retention is None, row.retention or 0.0)))


def _row(before: dict[str, Any], after: dict[str, Any]) -> BenchmarkRow:
    shared = ("task", "metric", "task_version", "higher_is_better", "samples", "few_shots", "chance")
    return BenchmarkRow(
        **{name: before[name] for name in shared},
        before=before["value"],
        after=after["value"],
        stderr_before=before["stderr"],
        stderr_after=after["stderr"],
    )


def command_line(
    tasks: Sequence[str], *, batch_size: int, limit: int | None, device: str, own_loader: bool, own_tasks: bool
) -> str:
    """Return what to type in the artifact's folder. Where the operator's tasks lie is for the reader's shell to know."""
    code = ",trust_remote_code=True" if own_loader else ""
    command = f"lm_eval run --model hf --model_args pretrained=.{code} --device {device} --tasks {shlex.quote(','.join(tasks))}"
    command += f" --batch_size {batch_size}"
    command += f" --limit {limit}" if limit is not None else ""
    return command + (f' --include_path "${TASKS_VARIABLE}"' if own_tasks else "")


def hash_of(folder: Path) -> str:
    """Return the sha256 over the names and contents of all files in a folder of tasks."""
    content = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        name, data = str(path.relative_to(folder)).encode(), path.read_bytes()
        content.update(f"{len(name)} {len(data)}\n".encode() + name + data)
    return content.hexdigest()
