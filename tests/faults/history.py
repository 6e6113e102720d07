"""What callers did and saw, written down as it happened, and the rules that no history may break.

The method is Jepsen's: clients note every call before it is made and what came of it, ``ok``, ``refused`` or ``unknown`` (the
connection broke, so it may or may not have happened); faults fall meanwhile; when all is quiet the notes are compared with
the database and the bucket.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from jobs.status import TERMINAL, JobStatus
from jobs.tables import Job, JobAttempt, JobBlock, JobEvent

OVER = {status.value for status in TERMINAL}
_PATHS = {
    "job.created": {None: "queued"}, "job.started": {"queued": "running"}, "job.attempt_failed": {"running": "queued"},
    "job.requeued": {"running": "queued"}, "job.cancelling": {"running": "cancelling"}, "job.succeeded": {"running": "succeeded"},
    "job.failed": {"running": "failed"}, "job.expired": {"queued": "expired"},
    "job.cancelled": {"queued": "cancelled", "cancelling": "cancelled"},
}  # fmt: skip
"""Which events change the status, from what to what."""


@dataclass
class Note:
    """One call: what was asked, and what is known of its fate."""

    operation: str
    about: dict[str, Any]
    fate: str = "unknown"
    answer: Any = None


@dataclass
class History:
    """All notes, from any thread."""

    notes: list[Note] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, operation: str, **about: Any) -> Note:
        """Write down that a call is about to be made."""
        note = Note(operation, about)
        with self.lock:
            self.notes.append(note)
        return note

    def of(self, operation: str, fate: str | None = None) -> list[Note]:
        """Return the notes of one kind."""
        return [note for note in self.notes if note.operation == operation and fate in (None, note.fate)]


@dataclass
class World:
    """How things stand when all is quiet."""

    jobs: Sequence[Job]
    events: dict[str, Sequence[JobEvent]]
    attempts: dict[str, Sequence[JobAttempt]]
    manifests: dict[str, dict[str, Any]]
    """Of succeeded jobs."""
    keys: Sequence[str]
    read: Any
    """Returns an object's bytes, given its key."""
    orphan_uploads: Sequence[str]
    parts: Sequence[JobBlock] = ()
    """The rows of finished blocks and studies."""
    told: Sequence[dict[str, Any]] = ()
    """Bodies that the webhooks' receiver got."""


def check(history: History, world: World) -> None:
    """Raise AssertionError naming the rule and the job where a promise was broken."""
    rows = {job.id: job for job in world.jobs}
    _check_posts(history, rows)
    for job in world.jobs:
        assert job.is_over, f"{job.id} is still {job.status}"
        _check_events(job, world.events[job.id])
        _check_attempts(job, world.attempts[job.id])
        _check_views(history, job)
        _check_streams(history, job, world.events[job.id])
        _check_told(job, world.told)
    _check_cancels(history, rows)
    _check_bucket(world)


def _check_posts(history: History, rows: dict[str, Job]) -> None:
    """P1, P4, P5: what was answered exists; a key made one job, whether or not its answers arrived."""
    by_key: defaultdict[str, set[str]] = defaultdict(set)
    for note in history.of("post", "ok"):
        assert note.answer in rows, f"P1: {note.answer} was answered with 201 and is gone"
        by_key[note.about["key"]].add(note.answer)
    for key, ids in by_key.items():
        assert len(ids) == 1, f"P5: key {key} made {sorted(ids)}"
    made = Counter(job.labels["key"] for job in rows.values())
    asked = {note.about["key"] for note in history.of("post")}
    assert set(made) <= asked, "P4: jobs that nobody asked for"
    assert [key for key, count in made.items() if count > 1] == [], "P5: a key with two jobs"


def _check_events(job: Job, events: Sequence[JobEvent]) -> None:
    """P7: numbered without gaps, and each the next legal move."""
    assert [event.seq for event in events] == list(range(1, job.last_seq + 1)), f"P7: the events of {job.id} have gaps"
    status: str | None = None
    for event in events:
        if event.type in _PATHS:
            assert status in _PATHS[event.type], f"P7: {job.id} was {status} when {event.type} came"
            status = _PATHS[event.type][status]
    assert status == job.status, f"P7: the events of {job.id} end with {status}, its row with {job.status}"
    ends = [event.type for event in events if event.type.removeprefix("job.") in OVER]
    assert len(ends) == 1, f"P3: {job.id} ended {len(ends)} times"


def _check_attempts(job: Job, attempts: Sequence[JobAttempt]) -> None:
    """P3: one lease at a time, fences that grow, one success at most."""
    assert [attempt.fence for attempt in attempts] == list(range(1, job.fence + 1)), f"{job.id} skipped a fence"
    for earlier, later in pairwise(attempts):
        assert earlier.ended_at is not None, f"{job.id}: attempt {earlier.fence} never ended"
        assert earlier.ended_at <= later.started_at, f"{job.id} was run twice at once: {earlier.fence} and {later.fence}"
    assert sum(attempt.outcome == "succeeded" for attempt in attempts) == (job.status == JobStatus.SUCCEEDED)


def _check_views(history: History, job: Job) -> None:
    """Terminal statuses never change, whatever replica answers."""
    seen = [note.answer["status"] for note in history.of("get", "ok") if note.about["job"] == job.id]
    ends = [place for place, status in enumerate(seen) if status in OVER]
    if ends:
        assert set(seen[ends[0] :]) == {seen[ends[0]]} == {job.status.value}, f"{job.id} was seen as {seen[ends[0] :]}"


def _check_streams(history: History, job: Job, events: Sequence[JobEvent]) -> None:
    """P7: a stream that was cut and resumed by id shows every event once."""
    table = [(event.seq, event.type) for event in events]
    for note in history.of("stream", "ok"):
        if note.about["job"] == job.id:
            assert [tuple(item) for item in note.answer] == table, f"P7: a stream of {job.id} differs from its events"


def _check_told(job: Job, told: Sequence[dict[str, Any]]) -> None:
    """P8: whoever asked to be told has been told at least once."""
    webhook = job.request.get("webhook")
    kind = f"job.{job.status}"
    if webhook is not None and kind in webhook["events"]:
        ours = [body for body in told if body["data"]["job_id"] == job.id and body["type"] == kind]
        assert ours, f"P8: nobody was told of {job.id}"


def _check_cancels(history: History, rows: dict[str, Job]) -> None:
    """P6: what was acknowledged as cancelled never succeeds."""
    for note in history.of("cancel", "ok"):
        if note.answer["status"] in ("cancelling", "cancelled"):
            status = rows[note.about["job"]].status
            assert status == JobStatus.CANCELLED, f"P6: {note.about['job']} was cancelled and is {status}"


def leftovers(world: World) -> list[str]:
    """Return the keys that belong to no artifact and to no finished part that somebody may still ask for."""
    artifacts = {
        f"things/{job.artifact_prefix}{path}"
        for job in world.jobs
        if job.status == JobStatus.SUCCEEDED
        for path in ("manifest.json", *(file["path"] for file in world.manifests[job.id]["files"]))
    }
    return sorted(set(world.keys) - artifacts - {key for key, _ in _kept_files(world)})


def _kept_files(world: World) -> list[tuple[str, str]]:
    """Return key and sha256 of parts that later jobs would find; those of a job that succeeded are to be gone."""
    served = {(job.owner, job.fingerprint) for job in world.jobs if job.status == JobStatus.SUCCEEDED}
    asked_for = [part for part in world.parts if (part.owner, part.fingerprint) not in served]
    return [(f"things/{file['key']}", file["sha256"]) for part in asked_for for file in part.files["files"]]


def _check_bucket(world: World) -> None:
    """P3: artifacts are complete and what their manifests say, finished blocks what their rows say; nothing else is left over."""
    for job in world.jobs:
        if job.status != JobStatus.SUCCEEDED:
            continue
        manifest = world.manifests[job.id]
        for file in manifest["files"]:
            key = f"things/{job.artifact_prefix}{file['path']}"
            assert _sha256(world, key) == file["sha256"], f"P3: {key} is not what the manifest says"
        key = f"things/{job.artifact_prefix}manifest.json"
        assert json.loads(world.read(key)) == manifest, f"P3: {key} is not the row's manifest"
    for key, sha256 in _kept_files(world):
        assert key in world.keys, f"P3: {key} is named by a row and gone"
        assert _sha256(world, key) == sha256, f"P3: {key} is not what its row says"
    left = leftovers(world)
    assert left == [], f"P11: objects of no artifact and of no unfinished run are left: {left}"
    assert list(world.orphan_uploads) == [], "P11: unfinished uploads are left"


def _sha256(world: World, key: str) -> str:
    return hashlib.sha256(world.read(key)).hexdigest()
