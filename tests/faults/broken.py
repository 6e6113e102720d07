"""Histories that break one rule each, made by hand from one that breaks none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.status import JobStatus
from jobs.tables import Job, JobAttempt, JobBlock, JobEvent
from tests.faults.history import History, Note, World

_START = datetime(2026, 11, 1, tzinfo=UTC)
_FILE = b"weights"
_MANIFEST = {"files": [{"path": "model.safetensors", "sha256": hashlib.sha256(_FILE).hexdigest()}], "bytes": len(_FILE)}
_PLACE = "things/artifacts/job_1/a2/"
_KEPT = "blocks/ann/study-1/job_1/a1/study/rows"


def sound() -> tuple[History, World]:
    """Return a job that was lost once, then succeeded, what its caller saw, and a study of it that later jobs may use."""
    kinds = ["job.created", "job.started", "job.attempt_failed", "job.started", "job.succeeded"]
    job = Job(
        id="job_1", status=JobStatus.SUCCEEDED, last_seq=len(kinds), fence=2, labels={"key": "k"},
        owner="ann", fingerprint="f", artifact_prefix="artifacts/job_1/a2/", request={"webhook": {"events": ["job.succeeded"]}},
    )  # fmt: skip
    attempts = [
        JobAttempt(job_id="job_1", fence=fence, started_at=_at(fence), ended_at=_at(fence + 0.9), outcome=outcome)
        for fence, outcome in ((1, "lost"), (2, "succeeded"))
    ]
    objects = {
        _PLACE + "model.safetensors": _FILE,
        f"things/{_KEPT}": _FILE,
        _PLACE + "manifest.json": json.dumps(_MANIFEST).encode(),
    }
    world = World(
        jobs=[job],
        events={"job_1": [JobEvent(job_id="job_1", seq=seq, type=kind) for seq, kind in enumerate(kinds, start=1)]},
        attempts={"job_1": attempts},
        manifests={"job_1": _MANIFEST},
        keys=sorted(objects),
        read=objects.__getitem__,
        orphan_uploads=[],
        parts=[_part("study-1", _KEPT)],
        told=[{"type": "job.succeeded", "data": {"job_id": "job_1"}}],
    )
    history = History()
    history.notes += [
        Note("post", {"key": "k"}),
        Note("post", {"key": "k"}, "ok", "job_1"),
        Note("get", {"job": "job_1"}, "ok", {"status": "succeeded"}),
        Note("stream", {"job": "job_1"}, "ok", [(seq, kind) for seq, kind in enumerate(kinds, start=1)]),
    ]
    return history, world


def broken_worlds() -> dict[str, tuple[History, World, str]]:
    """Return what is wrong -> a history that shows it, and what the checker must say."""
    return {name: (*_broken(change), rule) for name, (change, rule) in _CHANGES.items()}


def _broken(change: Callable[[History, World], None]) -> tuple[History, World]:
    history, world = sound()
    change(history, world)
    return history, world


def _at(hours: float) -> datetime:
    return _START + timedelta(hours=hours)


def _note(operation: str, fate: str, answer: Any, **about: Any) -> Callable[[History, World], None]:
    return lambda history, _: history.notes.append(Note(operation, about, fate, answer))


def _part(fingerprint: str, key: str) -> JobBlock:
    file = {"path": "rows", "key": key, "bytes": len(_FILE), "sha256": hashlib.sha256(_FILE).hexdigest()}
    return JobBlock(owner="ann", fingerprint=fingerprint, name="study", job_id="job_1", fence=1, files={"files": [file]})


def _twin(_: History, world: World) -> None:
    twin = Job(id="job_2", status=JobStatus.CANCELLED, last_seq=2, fence=0, labels={"key": "k"}, request={})
    kinds = ["job.created", "job.cancelled"]
    world.jobs = [*world.jobs, twin]
    world.events["job_2"] = [JobEvent(job_id="job_2", seq=seq, type=kind) for seq, kind in enumerate(kinds, start=1)]
    world.attempts["job_2"] = []


def _set(row: Callable[[World], Any], **columns: Any) -> Callable[[History, World], None]:
    def change(_: History, world: World) -> None:
        for name, value in columns.items():
            setattr(row(world), name, value)

    return change


_CHANGES: dict[str, tuple[Callable[[History, World], None], str]] = {
    "a job that was answered and lost": (_note("post", "ok", "job_9", key="k"), "P1"),
    "a key with two jobs": (_twin, "P5"),
    "a job that never ends": (_set(lambda world: world.jobs[0], status=JobStatus.RUNNING), "still"),
    "a gap in the events": (lambda _, world: world.events["job_1"].pop(2), "P7"),
    "an event out of order": (_set(lambda world: world.events["job_1"][2], type="job.succeeded"), "P7"),
    "two attempts at once": (_set(lambda world: world.attempts["job_1"][0], ended_at=_at(2.5)), "twice at once"),
    "a success of nobody": (_set(lambda world: world.attempts["job_1"][1], outcome="lost"), ""),
    "an end that was taken back": (
        lambda history, _: history.notes.insert(0, Note("get", {"job": "job_1"}, "ok", {"status": "failed"})),
        "was seen as",
    ),
    "a stream that lost an event": (lambda history, _: history.notes[3].answer.pop(1), "P7"),
    "a cancel that was forgotten": (_note("cancel", "ok", {"status": "cancelling"}, job="job_1"), "P6"),
    "a receiver that was not told": (_set(lambda world: world, told=[]), "P8"),
    "a file that is not the manifest's": (_set(lambda world: world, read=lambda _: b"other"), "P3"),
    "a part that is not the row's": (
        lambda _, world: world.parts[0].files["files"][0].update(sha256="0"),
        "not what its row says",
    ),
    "files that nobody owns": (_set(lambda world: world, keys=[f"things/{_KEPT}", "things/artifacts/job_0/a1/x"]), "P11"),
    "blocks of a job that succeeded": (_set(lambda world: world, parts=[_part("f", _KEPT)]), "P11"),
    "a part whose file is gone": (_set(lambda world: world, keys=[_PLACE + "manifest.json"]), "is named by a row and gone"),
    "an upload without an end": (_set(lambda world: world, orphan_uploads=["things/x"]), "P11"),
}
