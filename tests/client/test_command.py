"""The command: exit codes, what goes to which stream, and what ``--json`` prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import slimtrim_client
from slimtrim_client.cli import main
from tests.client import scripted
from tests.client.scripted import HANG_UP, HASTY, Reply, Scripted, event, job, problem
from tests.client.test_downloads import MANIFEST, Store, sha256

JOB, JOBS, PLANS = "GET /v1/jobs/job_x", "POST /v1/jobs", "POST /v1/plans"
EVENTS, REPORT = "GET /v1/jobs/job_x/events", "GET /v1/jobs/job_x/report"
PLAN = {
    "feasible": True, "profile": "portable", "bytes_before": 4000, "bytes_after": 1000, "smallest_possible_bytes": 500,
    "target_bytes": 1000, "memory": {"packed_engine": 1000, "transformers": 2000}, "steps": [{"step": "quantize"}],
    "provisional": False, "warnings": [{"code": "weak", "message": "[not markup]"}],
}  # fmt: skip
REPORTED = {
    "bytes_before": 4000, "bytes_after": 1000, "retention": 0.9, "lost": ["much"],
    "quality": {"perplexity_before": 8.0, "perplexity_after": 9.0, "divergence": 0.1, "top1_agreement": 0.8},
}  # fmt: skip
VERBS: dict[str, Sequence[str]] = {
    "plan": ["plan", "--model", "m", "--target", "1GB"],
    "submit": ["submit", "--model", "m", "--target", "1GB"],
    "submit and wait": ["submit", "--model", "m", "--target", "1GB", "--wait"],
    "watch": ["watch", "job_x"],
    "report": ["report", "job_x"],
    "download": ["download", "job_x"],
    "cancel": ["cancel", "job_x"],
    "list": ["list"],
    "retry": ["retry", "job_x"],
    "delete": ["delete", "job_x"],
}
CALLS = {
    "plan": PLANS, "submit": JOBS, "submit and wait": JOBS, "watch": EVENTS, "report": REPORT, "download": MANIFEST,
    "cancel": "POST /v1/jobs/job_x/cancel", "list": "GET /v1/jobs", "retry": "POST /v1/jobs/job_x/retry",
    "delete": "DELETE /v1/jobs/job_x",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(server: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        code = main(["--server", server.url, *arguments], patience=HASTY)
        return Ran(code, *capsys.readouterr())

    return run


def ends(server: Scripted, status: str, **more: Any) -> None:
    """Have everything work, and the job end like this."""
    server.answers |= {
        PLANS: [Reply(200, PLAN)],
        JOBS: [Reply(201, job("queued"))],
        EVENTS: [scripted.streamed(event(1, "job.created"), event(2, f"job.{status}"), end=True)],
        JOB: [Reply(200, job(status, **more))],
        REPORT: [Reply(200, REPORTED)],
        "POST /v1/jobs/job_x/cancel": [Reply(202, job("cancelling"))],
        "POST /v1/jobs/job_x/retry": [Reply(201, job("queued"))],
        "GET /v1/jobs": [Reply(200, {"object": "list", "data": [job(status)], "has_more": False, "next_cursor": None})],
        "DELETE /v1/jobs/job_x": [Reply(204)],
    }
    Store(server, {"model.safetensors": b"weights"})


def failed(code: str) -> dict[str, Any]:
    return {"status_reason": {"code": code, "message": "because", "retryable": False}}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_works_ends_with_0_and_its_json_is_read_by_programs(server: Scripted, run, verb: str):
    ends(server, "succeeded")

    plain, programs = run(*VERBS[verb]), run("--json", *VERBS[verb])
    documents = programs.documents

    assert (plain.code, programs.code) == (0, 0)
    assert plain.out + plain.err
    assert programs.err == ""
    assert len(documents) == (3 if verb == "watch" else 1)
    assert "\x1b" not in plain.out + plain.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_is_refused_ends_with_2_and_says_why(server: Scripted, run, verb: str):
    faults = [{"pointer": "/a", "code": "x", "detail": "is odd"}, {"pointer": "/b", "code": "x", "detail": "is even"}]
    server.answers[CALLS[verb]] = [problem(422, "validation_failed", "/a: is odd", errors=faults)]

    plain, programs = run(*VERBS[verb]), run("--json", *VERBS[verb])

    assert (plain.code, programs.code) == (2, 2)
    assert plain.out == ""
    assert "validation_failed: /a: is odd" in plain.err
    assert "  /b: is even" in plain.err
    assert programs.documents[-1]["problem"]["errors"] == faults


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_without_a_service_ends_with_4(server: Scripted, run, verb: str):
    server.answers |= {what: [HANG_UP] for what in (*CALLS.values(), JOB)}

    assert run(*VERBS[verb]).code == 4
    assert run("--json", *VERBS[verb]).documents[-1]["error"] == "Unreachable"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_at_a_service_that_is_down_ends_with_4(server: Scripted, run, verb: str):
    server.answers |= {what: [problem(503, "draining", "the service is stopping")] for what in (*CALLS.values(), JOB)}

    ran = run(*VERBS[verb])

    assert ran.code == 4
    assert "draining: the service is stopping" in ran.err


@pytest.mark.parametrize("verb", ["watch", "submit and wait"])
@pytest.mark.parametrize(
    ("status", "more", "code"),
    [("failed", failed("disk_full"), 1), ("failed", failed("constraint_violated"), 5), ("cancelled", {}, 3), ("expired", {}, 3)],
)
def test_who_waits_is_told_how_the_job_ended(server: Scripted, run, verb: str, status: str, more: dict[str, Any], code: int):
    ends(server, status, **more)

    plain, programs = run(*VERBS[verb]), run("--json", *VERBS[verb])

    assert (plain.code, programs.code) == (code, code)
    assert programs.documents[-1]["status"] == status
    assert "because" in plain.err or not more


@pytest.mark.parametrize("verb", ["watch", "submit and wait", "report"])
@pytest.mark.parametrize(("floor", "code"), [("0.9", 0), ("0.91", 5)])
def test_a_floor_for_retention_holds_where_the_service_knows_none(server: Scripted, run, verb: str, floor: str, code: int):
    ends(server, "succeeded")

    assert run(*VERBS[verb], "--min-retention", floor).code == code
    assert run("--json", *VERBS[verb], "--min-retention", floor).code == code


def test_a_damaged_download_ends_with_6_and_a_full_disk_with_7(server: Scripted, run):
    ends(server, "succeeded")
    store = Store(server, {"model.safetensors": b"weights"})
    store.damaged = 99
    damaged = run("download", "job_x")
    entry = {"path": "a", "bytes": 2**62, "sha256": sha256(b"a"), "url": "/a"}
    server.answers[MANIFEST] = [Reply(200, {"files": [entry]})]
    full = run("download", "job_x")

    assert (damaged.code, full.code) == (6, 7)
    assert "model.safetensors arrived twice" in damaged.err
    assert "make room" in full.err


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["submit", "--target", "1GB"], ["submit", "--model", "m", "--label", "x"], ["watch"], ["plan", "missing.json"],
     ["plan", "--model", "m", "--min-retention", "2"], ["plan", "--model", "m", "--set", "model.x=1"], ["report", ""],
     ["list", "--server", "ftp://x"], ["list", "--key-file", "missing"], ["download", "job_x", "--parallel", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_sends_nothing(server: Scripted, run, arguments: list[str]):
    server.answers[MANIFEST] = [Reply(200, {"files": []})]

    ran = run(*arguments)

    assert ran.code == 2
    assert ran.out == ""
    assert ran.err
    assert [seen for seen in server.seen if seen.method == "POST"] == []


def test_a_submitted_jobs_id_is_all_that_scripts_read(server: Scripted, run):
    ends(server, "succeeded")

    assert run("submit", "--model", "m", "--target", "1GB").out == "job_x\n"


# The request


def test_a_request_is_made_of_a_file_the_options_and_what_is_set(server: Scripted, run, tmp_path: Path):
    ends(server, "succeeded")
    (tmp_path / "job.json").write_text(json.dumps({"model": "old", "labels": {"a": "1"}, "serving": {"batch_size": 2}}))
    (tmp_path / "steps.json").write_text(json.dumps([{"step": "quantize"}]))

    run(
        "submit", "job.json", "--model", "m", "--recipe", "steps.json", "--target", "20GB", "--profile", "custom",
        "--calibration", "hub:x", "--samples", "8", "--evaluation", "file:///t", "--benchmark", "arc_easy", "--benchmark", "piqa",
        "--speed", "--min-retention", "0.9", "--on-violation", "report", "--label", "b=2=3", "--webhook", "https://h",
        "--set", "serving.context_tokens=4096", "--set", "limits.max_attempts=1", "--set", "revision=v1.0",
        "--idempotency-key", "mine",
    )  # fmt: skip

    [seen] = server.asked(JOBS)
    assert seen.headers["idempotency-key"] == "mine"
    assert seen.document == {
        "model": "m", "revision": "v1.0", "recipe": {"steps": [{"step": "quantize"}]}, "target_memory": "20GB",
        "profile": "custom", "labels": {"a": "1", "b": "2=3"}, "serving": {"batch_size": 2, "context_tokens": 4096},
        "calibration": {"source": "hub:x", "samples": 8}, "constraints": {"min_retention": 0.9, "on_violation": "report"},
        "evaluation": {"perplexity": {"source": "file:///t"}, "benchmarks": ["arc_easy", "piqa"], "speed": True},
        "webhook": {"url": "https://h"}, "limits": {"max_attempts": 1},
    }  # fmt: skip


def test_a_request_comes_from_standard_input_as_well(server: Scripted):
    ends(server, "succeeded")

    ran = command(server.url, "plan", "-", "--recipe", "auto", stdin='{"model": "m"}')

    assert ran.returncode == 0, ran.stderr
    assert server.asked(PLANS)[0].document == {"model": "m", "recipe": "auto"}


def test_pages_of_jobs_are_read_until_there_are_enough(server: Scripted, run):
    def page(seen: scripted.Seen) -> Reply:
        first = int(seen.query.get("after", "0"))
        count = int(seen.query["limit"])
        data = [job(id=f"job_{number}") for number in range(first, first + count)]
        return Reply(200, {"object": "list", "data": data, "has_more": True, "next_cursor": str(first + count)})

    server.answers["GET /v1/jobs"] = page
    [listed] = run("--json", "list", "--limit", "250", "--status", "running", "--label", "team=a").documents

    assert [each["id"] for each in listed["data"]] == [f"job_{number}" for number in range(250)]
    assert [seen.query["limit"] for seen in server.seen] == ["100", "100", "50"]
    assert {(seen.query["status"], seen.query["label.team"]) for seen in server.seen} == {("running", "a")}


# The key


def test_the_key_comes_from_the_environment_or_a_file_and_no_option_takes_it(
    server: Scripted, run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ends(server, "succeeded")
    (tmp_path / "key").write_text("from-file\n")
    run("list")
    run("list", "--key-file", "key")
    monkeypatch.setenv("SLIMTRIM_API_KEY_FILE", "key")
    run("list")
    monkeypatch.setenv("SLIMTRIM_API_KEY", "from-variable")
    run("list")

    keys = [seen.headers.get("authorization") for seen in server.seen]
    assert keys == [None, "Bearer from-file", "Bearer from-file", "Bearer from-variable"]
    assert [run("list", option, "secret-key").code for option in ("--api-key", "--key")] == [2, 2]


@pytest.mark.parametrize("key", ["two words", "schl\u00fcssel", "line\nbreak"])
def test_a_key_that_is_none_is_refused_and_not_shown(run, monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("SLIMTRIM_API_KEY", key)

    ran = run("list")

    assert ran.code == 2
    assert "API key" in ran.err
    assert key not in ran.err


def test_a_key_that_others_can_read_on_the_way_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SLIMTRIM_API_KEY", "secret-key")

    code = main(["list", "--server", "http://slimtrim.invalid"], patience=HASTY)

    told = capsys.readouterr().err
    assert code == 4
    assert "without encryption" in told
    assert "secret-key" not in told


# As a process


def command(url: str, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slimtrim_client", "--server", url, *arguments], env=ours(**environment), input=stdin,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def ours(**environment: str) -> dict[str, str]:
    source = str(Path(slimtrim_client.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, **environment}


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
def test_what_is_no_terminal_gets_no_colour(
    server: Scripted, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    ends(server, "succeeded")

    for verb in ("plan", "download"):
        ran = command(server.url, *VERBS[verb], **environment)
        assert ran.returncode == 0, ran.stderr
        assert "\x1b" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["for people", "for programs"])
def test_a_reader_that_has_seen_enough_is_no_failure(server: Scripted, form: list[str]):
    ends(server, "succeeded")
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        ran = subprocess.run(
            [sys.executable, "-m", "slimtrim_client", "--server", server.url, *form, "list"], env=ours(),
            stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip

    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_interrupted_watcher_leaves_the_job_and_says_how_to_go_on(server: Scripted):
    ends(server, "succeeded")
    server.answers[EVENTS] = [scripted.streamed(event(1, "job.started"), heartbeat=True)]
    with subprocess.Popen(
        [sys.executable, "-m", "slimtrim_client", "--server", server.url, "watch", "job_x"], env=ours(),
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where tests run in the background it is ignored
    ) as process:  # fmt: skip
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()

    assert "started" in first
    assert process.returncode == 130
    assert "slimtrim watch job_x" in rest
    assert "Traceback" not in rest
    assert [seen.method for seen in server.seen if seen.method != "GET"] == []
