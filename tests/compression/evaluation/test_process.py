"""Child processes: refused early, never left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from compression.errors import DownloadFailed, EvaluationFailed, Stopped, ValidationFailed
from compression.evaluation.process import run_child
from compression.pipeline import compress
from compression.progress import BlockDone, Event, Warned
from tests.compression.evaluation.conftest import QUANTIZE, a_request
from tests.compression.heard import Heard

HARNESS = "compression.evaluation.harness"


def children() -> list[psutil.Process]:
    found = list[psutil.Process]()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that ends just now has no command line
            if "compression.evaluation" in " ".join(child.cmdline()):
                found.append(child)
    return found


def never() -> None:
    """Nobody asks to stop."""


def test_an_unknown_task_is_refused_before_anything_is_compressed(tiny: Path, tmp_path: Path):
    with pytest.raises(ValidationFailed) as refusal:
        compress(a_request(tiny, [QUANTIZE], benchmarks=["arc_eazy"]), tiny, tmp_path / "out")

    assert refusal.value.pointer == "/evaluation/benchmarks/0"
    assert "arc_easy" in refusal.value.message
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_fetched_is_worth_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: l\n")  # fmt: skip

    with pytest.raises(DownloadFailed) as failure:
        run_child(HARNESS, {"tasks": ["far"], "folder": str(tmp_path)}, check=never, on_progress=lambda *_: None)

    assert failure.value.retryable


def test_a_child_that_falls_says_what_happened():
    with pytest.raises(EvaluationFailed, match="KeyError: 'tasks'"):
        run_child(HARNESS, {}, check=never, on_progress=lambda *_: None)


def test_stopping_leaves_no_child_behind(tiny: Path, tmp_path: Path):
    class StopsAtPrompts(Heard):
        def should_stop(self) -> bool:
            return bool(children()) and any(isinstance(e, BlockDone) and "prompts" in e.message for e in self.events)

    request = a_request(tiny, [QUANTIZE], generation={"source": ["The"], "new_tokens": 400})

    with pytest.raises(Stopped):
        compress(request, tiny, tmp_path / "out", StopsAtPrompts())

    assert children() == []


def test_a_child_ends_with_its_parent():
    work = json.dumps({"tasks": ["far"], "folder": None})
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', {HARNESS!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        f"child.stdin.write(({work!r} + chr(10)).encode()); child.stdin.flush(); print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))

    parent.kill()
    parent.wait()

    child.wait(timeout=60)


def test_what_does_not_fit_is_said_and_not_tried(tiny: Path, tmp_path: Path):
    listener = Heard()

    report = compress(
        a_request(tiny, [QUANTIZE], generation={"source": ["The"]}, speed=True), tiny, tmp_path, listener, host_memory=10**6
    )

    assert [note.what for note in report.not_measured] == ["generation", "speed"]
    assert (report.generation, report.speed) == (None, None)
    assert report.quality.domains
    assert any(line.startswith("Speed could not be measured: opening the bigger model whole needs ") for line in report.lost)
    assert sum(_is_not_measured(event) for event in listener.events) == 2


def _is_not_measured(event: Event) -> bool:
    return isinstance(event, Warned) and event.code == "not_measured"
