"""python -m compression RECIPE.yaml MODEL OUT: compress a local checkpoint without any service.

The recipe file holds what the body of ``POST /v1/jobs`` holds, except ``model``; a bare list of steps will do.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from compression.errors import SlimtrimError, ValidationFailed
from compression.progress import BlockDone, Event, StageStarted, Warned
from compression.report import Report
from compression.request import Compression


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, or 1 with one clear line when the request or the run fails."""
    parser = argparse.ArgumentParser(prog="python -m compression", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="steps, and any other field of a job's request")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint to compress")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the artifact; new or empty")
    parser.add_argument("--studies", type=Path, default=_studies(), metavar="FOLDER", help="where studies of models are kept")
    own = "benchmarks of your own, for lm-evaluation-harness; what lies there may run code"
    parser.add_argument("--tasks", type=Path, metavar="FOLDER", help=own)
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    logging.basicConfig(level=os.environ.get("SLIMTRIM_LOG", "WARNING"))
    try:
        report = run(given.recipe, given.model, given.out, console, studies=given.studies, tasks=given.tasks)
    except SlimtrimError as error:
        console.print(f"[bold red]{error.code}[/]: {error.message}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the files in OUT are incomplete", highlight=False)
        return 130
    console.print(summary(report))
    for line in report.lost:
        console.print(f"- {line}", highlight=False)
    return 0


def _studies() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimtrim" / "studies"


def run(
    recipe: Path, model: Path, out: Path, console: Console, *, studies: Path | None = None, tasks: Path | None = None
) -> Report:
    """Read the recipe file and compress, drawing a progress bar on the console."""
    request = read_request(recipe, model)
    if out.exists() and any(out.iterdir()):
        raise ValidationFailed(f"{out} is not empty; name a new folder")
    if tasks is not None and not tasks.is_dir():
        raise ValidationFailed(f"there is no folder of tasks {tasks}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' own bars would tear ours
    from compression.pipeline import compress  # torch takes seconds to load: not before the request is known to be sound

    with Bar(console) as bar:
        return compress(request, model, out, bar, studies=studies, tasks=tasks)


def read_request(recipe: Path, model: Path) -> Compression:
    """Return the request that a recipe file makes for a model folder."""
    try:
        content: Any = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValidationFailed(f"cannot read {recipe}: {error}") from error
    if isinstance(content, list):
        content = {"recipe": {"steps": content}}
    elif isinstance(content, dict) and "steps" in content:
        content = {"recipe": content}
    if not isinstance(content, dict):
        raise ValidationFailed(f"{recipe} holds neither a list of steps nor a request")
    try:
        return Compression.model_validate({"model": model.resolve().as_uri(), **content})
    except ValidationError as error:
        lines = (f"{'/'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValidationFailed(f"{recipe}: " + "; ".join(lines)) from error


class Bar:
    """Draws one bar for the whole run; the message says which block of which stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._console = console
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._task: TaskID = self._progress.add_task("starting", total=100, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_event(self, event: Event) -> None:
        """Move the bar, or print a warning above it."""
        match event:
            case StageStarted(stage, fraction):
                self._progress.update(self._task, description=stage, completed=round(100 * fraction), note="")
            case BlockDone(fraction=fraction, message=message):
                self._progress.update(self._task, completed=round(100 * fraction), note=message)
            case Warned(code, message):
                self._console.print(f"[yellow]{code}[/]: {message}", highlight=False)

    def should_stop(self) -> bool:
        """Never: Ctrl-C interrupts."""
        return False


def summary(report: Report) -> Table:
    """Return the report's main numbers as a table."""
    quality = report.quality
    table = Table("", "original", "artifact", title=f"{report.ratio:.2f} times smaller, retention {report.retention:.1%}")
    table.add_row("bytes of tensors", f"{report.bytes_before:,}", f"{report.bytes_after:,}")
    table.add_row("perplexity", f"{quality.perplexity_before:.3f}", f"{quality.perplexity_after:.3f}")
    table.add_row("divergence, nats per token", "0", f"{quality.divergence:.4f}")
    table.add_row("top-1 agreement", "1", f"{quality.top1_agreement:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
