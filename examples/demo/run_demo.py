"""The demo: train a small mixture, have the service squeeze it into a quarter of its bytes, and look at what is left.

    python -m examples.demo.run_demo [FOLDER]

Everything it makes lies below FOLDER (default .demo). Training and generating are processes of their own; for the service
this is a caller like any other, through ``slimtrim_client``.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from examples.demo.errors import DemoFailed
from examples.demo.service import Service
from examples.demo.tables import plan_table, report_table, seconds_table
from slimtrim_client import Client, Job, SlimtrimError, problem_of

SHARE = 4
"""The target is one part in so many of the model's bytes."""
STEPS: list[dict[str, Any]] = [
    {"step": "expert_drop", "criterion": "reap", "experts_kept": 7},
    {"step": "block_drop", "blocks_dropped": 1},
    {"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 64, "attention": "W4A16"},
]


def main(arguments: list[str]) -> int:
    """Run the demo and return the exit status."""
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        Demo(Path(arguments[0] if arguments else ".demo"), console).run()
    except (DemoFailed, SlimtrimError) as failure:
        console.print(f"[bold red]The demo failed.[/] {failure}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def request_for(folder: Path) -> dict[str, Any]:
    """Return the body of the job, but for its target."""
    here = folder.resolve()
    return {
        "model": (here / "model").as_uri(),
        "recipe": {"steps": STEPS},
        "calibration": {"source": (here / "calibration.jsonl").as_uri(), "samples": 256, "sequence_length": 128, "seed": 0},
        "evaluation": {"perplexity": {"source": (here / "heldout.jsonl").as_uri(), "samples": 128}},
        "labels": {"from": "demo"},
    }


@dataclass
class Demo:
    """The parts, in the order in which they happen."""

    folder: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Train, compress over HTTP, download, compare."""
        with self._part("1. A model", "train"):
            self._module("examples.demo.train_model", str(self.folder))
        with ExitStack() as stack:
            with self._part("2. The service", "start the service"):
                service = stack.enter_context(Service(self.folder))
            self.console.print(f"{service.url} is ready; its log is {self.folder / 'service.log'}", highlight=False)
            self._compress(stack.enter_context(Client(service.url, key="")))
        with self._part("5. Both models, opened with stock transformers", "generate"):
            self._module("examples.demo.generate", str(self.folder / "model"), str(self.folder / "artifact"))
        self.console.print(seconds_table(self.seconds))

    def _compress(self, client: Client) -> None:
        with self._part("3. A job", "job"):
            request = request_for(self.folder)
            request["target_memory"] = client.plan(request)["bytes_before"] // SHARE
            self.console.print(plan_table(client.plan(request)))
            job = self._follow(client, client.submit(request)["id"])
        with self._part("4. The report, and the artifact", "report and download"):
            report = client.report(job["id"])
            self.console.print(report_table(report))
            for line in report["lost"]:
                self.console.print(f"- {line}", highlight=False)
            target = self.folder / "artifact"
            shutil.rmtree(target, ignore_errors=True)
            got = client.download(job["id"], target)
            self.console.print(
                f"{len(got.files)} files, {got.bytes:,} bytes, every sha256 as the manifest says: {target}", highlight=False
            )

    def _follow(self, client: Client, job_id: str) -> Job:
        """Draw the job's progress until it is over; cancel it when we are interrupted."""
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        job: Job | None = None
        try:
            with Progress(*columns, TimeElapsedColumn(), console=self.console) as bar:
                task = bar.add_task("queued", total=1.0, note="")
                for job in client.follow(job_id):
                    said = job["stage"] if job["status"] == "running" else None
                    note = job["progress"]["message"] or ""
                    bar.update(task, description=said or job["status"], completed=job["progress"]["fraction"], note=note)
        except KeyboardInterrupt:
            with suppress(SlimtrimError):
                client.cancel(job_id)
            raise
        assert job is not None, "a job that is followed is yielded at least once"
        if problem := problem_of(job):
            raise problem
        return job

    def _module(self, name: str, *arguments: str) -> None:
        """Run one of our modules. What it says on standard error, loaders' bars above all, is shown only when it fails."""
        ended = subprocess.run([sys.executable, "-m", name, *arguments], stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            last = "\n".join(ended.stderr.splitlines()[-15:])
            raise DemoFailed(f"python -m {name} ended with exit status {ended.returncode}\n{last}")

    @contextmanager
    def _part(self, title: str, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
