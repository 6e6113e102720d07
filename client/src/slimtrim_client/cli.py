"""The command ``slimtrim``: read the options, do the verb, say how it went in words and by the exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from slimtrim_client import screens
from slimtrim_client.client import Client
from slimtrim_client.connection import key_of_file
from slimtrim_client.documents import Job
from slimtrim_client.errors import CannotWrite, Problem, SlimtrimError
from slimtrim_client.options import body_of, labels_of, parser
from slimtrim_client.outcomes import problem_of
from slimtrim_client.retries import Patience

INTERRUPTED = 130
_MOST_AT_ONCE = 100


def run() -> None:
    """Be the console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str], patience: Patience | None = None) -> int:
    """Do what the arguments say and return the exit code."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said everything
        return stop.code if isinstance(stop.code, int) else 2
    command = Command(options)
    try:
        key = None if options.key_file is None else key_of_file(options.key_file)
        with Client(options.server, key=key, patience=patience) as client:
            if client.connection.shows_its_key:
                command.hint(f"warning: the API key goes to {client.connection.url} without encryption")
            return command.do(client)
    except SlimtrimError as error:
        return command.fail(error)
    except KeyboardInterrupt:
        command.say_way_on()
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class Command:
    """One call of the command. Results go to standard output, everything else to standard error."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out, self._err = screens.console_for(sys.stdout), screens.console_for(sys.stderr)
        self._way_on = "stopped"

    def do(self, client: Client) -> int:
        """Do the verb."""
        verbs: dict[str, Callable[[Client], int]] = {
            "plan": self._plan, "submit": self._submit, "watch": self._watch, "report": self._report, "download": self._download,
            "cancel": self._cancel, "list": self._list, "retry": self._retry, "delete": self._delete,
        }  # fmt: skip
        return verbs[self._options.verb](client)

    def hint(self, text: str) -> None:
        """Tell people something that is no result."""
        if not self._options.json:
            self._err.print(Text(text))

    def say_way_on(self) -> None:
        """Tell somebody who interrupts how to go on."""
        self._err.print(Text(self._way_on))

    def fail(self, error: SlimtrimError) -> int:
        """Say what went wrong; return the exit code for it."""
        if self._options.json:
            known: dict[str, Any] = {"code": error.code, "problem": error.document} if isinstance(error, Problem) else {}
            self._print_json({"object": "error", "error": type(error).__name__, "message": str(error), **known})
        else:
            self._err.print(Text(f"slimtrim: {error}"))
        return error.exit_code

    def _plan(self, client: Client) -> int:
        plan = client.plan(body_of(self._options))
        if not self._is_json(plan):
            self._out.print(screens.plan_table(plan))
            self._say(*screens.plan_notes(plan))
        return 0

    def _submit(self, client: Client) -> int:
        job = client.submit(body_of(self._options), idempotency_key=self._options.idempotency_key)
        if self._options.wait:
            self._say(job["id"])
            return self._end(self._to_the_end(client, job["id"], 0, in_lines=False))
        if not self._is_json(job):
            self._say(job["id"])
            self.hint(f"{job['status']}; follow it with: slimtrim watch {job['id']}")
        return 0

    def _watch(self, client: Client) -> int:
        return self._end(self._to_the_end(client, self._options.job, self._options.after, in_lines=True))

    def _to_the_end(self, client: Client, job_id: str, after: int, *, in_lines: bool) -> Job:
        """Show a job's events, and return it once it is over."""
        self._way_on = f"detached; the job goes on. To follow it: slimtrim watch {job_id}; to end it: slimtrim cancel {job_id}"
        if self._options.json:
            for event in client.watch(job_id, after=after) if in_lines else ():
                self._print_json(event)
            return client.wait(job_id)
        with screens.JobScreen(self._err) as screen:
            for event in client.watch(job_id, after=after):
                screen.show(event)
        return client.wait(job_id)

    def _end(self, job: Job) -> int:
        """Say how a job ended; return the exit code for it."""
        problem = problem_of(job, self._options.min_retention)
        if not self._is_json(job):
            if problem is not None:
                return self.fail(problem)
            self.hint(screens.end_of(job))
            self.hint(f"fetch it with: slimtrim download {job['id']}")
        return 0 if problem is None else problem.exit_code

    def _report(self, client: Client) -> int:
        job_id, floor = self._options.job, self._options.min_retention
        if self._options.html is not None:
            page = client.report_page(job_id)
            _write(self._options.html, page)
            self.hint(f"written to {self._options.html}")
        else:
            report = client.report(job_id)
            if not self._is_json(report):
                self._out.print(screens.report_table(report))
                self._say(*(f"- {line}" for line in report.get("lost", [])))
        problem = None if floor is None else problem_of(client.job(job_id), floor)
        if problem is not None:
            self.hint(f"slimtrim: {problem}")
        return 0 if problem is None else problem.exit_code

    def _download(self, client: Client) -> int:
        folder = self._options.folder or Path(self._options.job)
        self._way_on = "stopped; the same command goes on where this one was"
        with screens.FileScreen(self._err) as screen:
            show = None if self._options.json else screen.show
            got = client.download(self._options.job, folder, parallel=self._options.parallel, on_progress=show)
        files = [
            {"path": str(file.path), "bytes": file.bytes, "sha256": file.sha256, "fetched": file.fetched} for file in got.files
        ]
        document = {"object": "download", "job": self._options.job, "folder": str(got.folder), "bytes": got.bytes, "files": files}
        if not self._is_json(document):
            self._say(str(got.folder))
            fetched = sum(file.fetched for file in got.files)
            self.hint(f"{len(files)} files, {got.bytes:,} bytes, {fetched} of them fetched, every sha256 as the manifest says")
        return 0

    def _cancel(self, client: Client) -> int:
        return self._show(client.cancel(self._options.job))

    def _retry(self, client: Client) -> int:
        return self._show(client.retry(self._options.job))

    def _delete(self, client: Client) -> int:
        client.delete(self._options.job)
        if not self._is_json({"object": "deleted", "id": self._options.job}):
            self._say(f"{self._options.job} deleted")
        return 0

    def _list(self, client: Client) -> int:
        options, after, jobs = self._options, self._options.after, list[Job]()
        while True:
            page = client.list(
                status=options.status, model=options.model, labels=labels_of(options.label),
                limit=max(1, min(options.limit - len(jobs), _MOST_AT_ONCE)), after=after,
            )  # fmt: skip
            jobs, after = [*jobs, *page["data"]], page["next_cursor"]
            if not page["has_more"] or len(jobs) >= options.limit:
                break
        if not self._is_json({**page, "data": jobs}):
            self._out.print(screens.job_table(jobs))
            if page["has_more"]:
                self.hint(f"there are more; go on with --after {after}")
        return 0

    def _show(self, job: Job) -> int:
        if not self._is_json(job):
            self._say(f"{job['id']} {job['status']}")
        return 0

    def _is_json(self, document: Any) -> bool:
        """Print the document if that is what is wanted."""
        if self._options.json:
            self._print_json(document)
        return self._options.json

    def _print_json(self, document: Any) -> None:
        print(json.dumps(document, ensure_ascii=False, separators=(",", ":")), flush=True)  # noqa: T201

    def _say(self, *lines: str) -> None:
        if not self._options.json:
            for line in lines:
                self._out.print(Text(line))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"{file} cannot be written: {error.strerror}") from error
