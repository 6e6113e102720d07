"""What people see: tables on standard output, progress and hints on standard error.

Colours and moving bars are for terminals alone, and ``NO_COLOR`` turns colours off; elsewhere the same is said in plain lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from slimtrim_client.documents import Event, Job, Plan, Report

_PLAIN_WIDTH = 200


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process with 1, which here means that a job failed.
        raise BrokenPipeError


def console_for(stream: TextIO) -> Console:
    """Return a console that never cuts a line because it does not know how wide the reader is."""
    is_plain = not stream.isatty()
    return _Console(
        file=stream, width=_PLAIN_WIDTH if is_plain else None, highlight=False, soft_wrap=is_plain, emoji=False, markup=False,
        no_color=True if is_plain or os.environ.get("NO_COLOR") else None, force_terminal=False if is_plain else None,
    )  # fmt: skip


def plan_table(plan: Plan) -> Table:
    """Return what a plan promises."""
    table = Table("plan", "bytes", title_justify="left", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in (
        ("model", plan.get("bytes_before")),
        ("target", plan.get("target_bytes")),
        ("artifact", plan.get("bytes_after")),
        ("smallest possible", plan.get("smallest_possible_bytes")),
        ("needed by an engine on packed weights", plan.get("memory", {}).get("packed_engine")),
        ("needed by stock transformers", plan.get("memory", {}).get("transformers")),
    ):
        table.add_row(name, number(value))
    return table


def plan_notes(plan: Plan) -> list[str]:
    """Return what else there is to say about a plan."""
    steps = ", ".join(str(step.get("step")) for step in plan.get("steps", []))
    lines = [f"steps: {steps or 'none'}"]
    if plan.get("provisional"):
        lines.append("provisional: a study of the model may still change the steps")
    return lines + [f"warning: {each['code']}: {each['message']}" for each in plan.get("warnings", [])]


def report_table(report: Report) -> Table:
    """Return what a report says happened, as far as this version knows its fields."""
    quality: Mapping[str, Any] = report.get("quality") or {}
    table = Table("report", "original", "artifact", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("bytes of tensors", number(report.get("bytes_before")), number(report.get("bytes_after")))
    table.add_row("perplexity", decimal(quality.get("perplexity_before")), decimal(quality.get("perplexity_after")))
    table.add_row("divergence, nats per token", "", decimal(quality.get("divergence"), 4))
    table.add_row("same next token", "", percent(quality.get("top1_agreement")))
    table.add_row("retention, the worst measured", "", percent(report.get("retention")))
    benchmarks: Mapping[str, Any] = report.get("benchmarks") or {}
    for row in benchmarks.get("rows", []):
        table.add_row(f"{row.get('task')} {row.get('metric')}", decimal(row.get("before"), 4), decimal(row.get("after"), 4))
    return table


def job_table(jobs: list[Job]) -> Table:
    """Return a line for each job."""
    table = Table("job", "status", "made", "ratio", "retention", "model", box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for job in jobs:
        result: Mapping[str, Any] = job.get("result") or {}
        made, ratio = f"{job['created_at'][:19]}Z", decimal(result.get("ratio"))
        model = str(job.get("request", {}).get("model", ""))
        table.add_row(job["id"], job["status"], made, ratio, percent(result.get("retention")), Text(model))
    return table


def end_of(job: Job) -> str:
    """Return how a job ended, in a line."""
    result = job["result"]
    if job["status"] != "succeeded" or result is None:
        return f"{job['id']} {job['status']}"
    kept = "" if result.get("retention") is None else f", keeps {percent(result['retention'])}"
    return f"{job['id']} succeeded: {number(result['bytes_after'])} of {number(result['bytes_before'])} bytes{kept}"


class JobScreen:
    """A job's progress: a bar on a terminal, a line per piece of news elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("queued", total=1.0, note="")

    def __enter__(self) -> JobScreen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Take an event."""
        kind, data = event["type"].removeprefix("job."), event["data"]
        if kind == "progress":
            self._bar.update(self._task, completed=data.get("fraction", 0.0), note=str(data.get("message") or ""))
        elif kind == "stage":
            self._bar.update(self._task, description=str(data.get("stage")), note="")
            self._say(event, f"{data.get('stage')}")
        else:
            self._bar.update(self._task, description=kind, completed=1.0 if kind == "succeeded" else None)
            self._say(event, _news(kind, data), always=kind not in ("created", "started", "succeeded"))

    def _say(self, event: Event, text: str, *, always: bool = False) -> None:
        if always or not self._console.is_terminal:
            self._console.print(Text(f"{event['at']} {text}"))


class FileScreen:
    """Files on their way: a bar for each that moves and one for all; elsewhere a line per file that is there."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._total = self._bars.add_task("all files", total=None)
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def __enter__(self) -> FileScreen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, path: str, done: int, size: int) -> None:
        """Take how far a file is."""
        was = self._done.get(path, 0)
        self._done[path], self._sizes[path] = done, size
        self._bars.update(self._total, completed=sum(self._done.values()), total=sum(self._sizes.values()))
        if done >= size and (was < size or path not in self._sizes):
            if path in self._tasks:
                self._bars.remove_task(self._tasks.pop(path))
            if not self._console.is_terminal:
                self._console.print(Text(f"{path} {size:,} bytes"))
        elif 0 < done < size:
            if path not in self._tasks:
                self._tasks[path] = self._bars.add_task(path, total=size)
            self._bars.update(self._tasks[path], completed=done)


def number(value: Any) -> str:
    """Return an integer for people."""
    return "-" if value is None else f"{value:,}"


def decimal(value: Any, places: int = 2) -> str:
    """Return a fraction for people."""
    return "-" if value is None else f"{value:.{places}f}"


def percent(value: Any) -> str:
    """Return a share for people."""
    return "-" if value is None else f"{value:.1%}"


def _news(kind: str, data: Mapping[str, Any]) -> str:
    reason: Any = data.get("reason") or data
    inner = cast("Mapping[str, Any]", reason) if isinstance(reason, Mapping) else {"message": reason}
    code, message = inner.get("code"), inner.get("message")
    told = ": ".join(str(each) for each in (code, message) if each)
    return f"{kind}: {told}" if told else kind
