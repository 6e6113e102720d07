"""A child process is heard, fed, and never left behind, whatever it does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from compression.errors import BrokenCheckpoint, DiskFull, OutOfGpuMemory, OutOfHostMemory, SlimtrimError
from jobs.errors import WorkerLost
from tests.worker.stand import has_ended
from worker import process
from worker.faults import as_ours
from worker.leash import Interrupted, Interruption, Leash
from worker.memory import memory_of
from worker.process import LeaseLapsed, OnEvent, run_child

FOREVER = float(2**40)


def run(
    kind: str,
    leash: Leash | None = None,
    on_event: OnEvent = lambda _line, _reply: None,
    *,
    grace_s: float = 0.2,
    memory_limit: int = 0,
    **work: Any,
) -> dict[str, Any]:
    arguments = ["tests.worker.odd_children", kind]
    graces = {Interruption.CANCEL: grace_s}
    return run_child(
        arguments, work, leash or Leash(FOREVER), environment=dict(os.environ), grace_s=graces, on_event=on_event,
        memory_limit=memory_limit,
    )  # fmt: skip


def is_gone(pid: int) -> bool:
    """Say whether the process ends; init may take a moment to bury it."""
    try:
        asked = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return True
    end = time.monotonic() + 10
    while not has_ended(asked) and time.monotonic() < end:
        time.sleep(0.01)
    return has_ended(asked)


def test_a_child_that_asks_is_answered_from_another_thread_while_its_lease_is_renewed():
    leash = Leash(FOREVER)

    def answer_later(line: Any, reply: Callable[[Any], None]) -> None:
        leash.extend(FOREVER)  # a line that is no answer comes first
        threading.Thread(target=reply, args=({"found": line["question"] * 2},)).start()

    assert run("asks", leash, answer_later)["answers"] == [{"found": 14}, {"found": 16}]


def test_work_of_any_size_goes_in_and_the_result_comes_out():
    text = "ä" * 2**20

    assert run("echo", text=text)["work"] == {"text": text}


@pytest.mark.parametrize(
    ("kind", "part"), [("exit", "exit code 3"), ("quiet exit", "exit code 0"), ("says half a word", "exit code 0")]
)
def test_a_child_that_ends_without_a_result_is_lost_and_says_how(kind: str, part: str):
    with pytest.raises(WorkerLost, match=part):
        run(kind)


def test_a_child_that_takes_too_much_memory_is_killed_with_all_it_started_and_says_so():
    limit = 150_000_000  # a bare interpreter takes some twenty million

    with pytest.raises(OutOfHostMemory, match=f"SLIMTRIM_JOB_MEMORY_BYTES allows {limit}") as refusal:
        run("takes memory", memory_limit=limit)

    assert not refusal.value.retryable


def test_mapped_files_do_not_count_as_memory(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    program = "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1); sum(m[::4096]); print(); input()"
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as mapping:
        assert mapping.stdout is not None
        mapping.stdout.readline()

        assert psutil.Process(mapping.pid).memory_info().rss > 100_000_000
        assert memory_of(mapping.pid) < 90_000_000
        mapping.kill()
    assert memory_of(mapping.pid) == 0


def test_nothing_of_a_child_survives_it():
    assert is_gone(run("leaves a grandchild")["pid"])


def test_a_dead_child_is_noticed_though_a_grandchild_holds_its_pipe():
    seen = list[int]()

    with pytest.raises(WorkerLost, match="SIGABRT"):
        run("dies before its grandchild", on_event=lambda line, _: seen.append(line["pid"]))

    assert is_gone(seen[0])


def test_a_child_that_stays_after_its_last_word_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "_EXIT_S", 0.2)

    assert run("stays after its last word") == {"type": "result"}


@pytest.mark.parametrize("reason", Interruption)
def test_a_child_that_talks_without_end_is_still_interrupted(reason: Interruption):
    leash, heard = Leash(FOREVER), threading.Event()
    threading.Thread(target=lambda: (heard.wait(), leash.pull(reason))).start()

    with pytest.raises(Interrupted) as interrupted:
        run("talks without end", leash, lambda _line, _reply: heard.set())

    assert interrupted.value.reason is reason


def test_what_was_pulled_before_the_start_starts_nothing():
    leash = Leash(FOREVER)
    leash.pull(Interruption.DRAIN)

    with pytest.raises(Interrupted):
        run("no such kind", leash)


def test_a_lost_row_overrides_every_other_reason_and_nothing_overrides_it():
    leash = Leash(FOREVER)

    reasons = list[Interruption | None]()
    for reason in (Interruption.CANCEL, Interruption.DRAIN, Interruption.LOST, Interruption.CANCEL):
        leash.pull(reason)
        reasons.append(leash.reason)

    assert reasons == [Interruption.CANCEL, Interruption.CANCEL, Interruption.LOST, Interruption.LOST]


def test_a_child_stops_by_itself_when_its_lease_has_passed():
    with pytest.raises(LeaseLapsed):
        run("waits for its lease to pass", Leash(time.monotonic() + 0.5))


def test_a_renewal_reaches_the_child():
    leash = Leash(time.monotonic() + 3600)
    # A renewal to a moment that has passed is the one that shows at once.
    threading.Timer(0.5, lambda: leash.extend(time.monotonic() - 1)).start()

    with pytest.raises(LeaseLapsed):
        run("waits for its lease to pass", leash)


def test_a_child_that_is_asked_to_stop_has_its_grace_to_do_so():
    leash = Leash(FOREVER)
    threading.Timer(0.5, lambda: leash.pull(Interruption.CANCEL)).start()
    before = time.monotonic()

    with pytest.raises(Interrupted):
        run("waits for its lease to pass", leash, grace_s=300.0)

    assert time.monotonic() - before < 200  # it was not the grace that ended it


class FakeSafetensorError(Exception): ...


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (MemoryError(), OutOfHostMemory),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), OutOfHostMemory),
        (OSError(28, "No space left on device"), DiskFull),
        (FakeSafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFull),
        (BrokenCheckpoint("as it is"), BrokenCheckpoint),
        (KeyError("secret"), SlimtrimError),
    ],
)
def test_what_goes_wrong_gets_its_name(error: Exception, ours: type[SlimtrimError]):
    named = as_ours(error)

    assert type(named) is ours
    assert "secret" not in named.message


def test_the_accelerators_memory_has_its_own_name(monkeypatch: pytest.MonkeyPatch):
    class FakeTorch:
        class OutOfMemoryError(RuntimeError): ...

    monkeypatch.setitem(__import__("sys").modules, "torch", FakeTorch)

    assert type(as_ours(FakeTorch.OutOfMemoryError("CUDA out of memory"))) is OutOfGpuMemory
    assert type(as_ours(RuntimeError("else"))) is SlimtrimError
