"""One attempt at one job: fetch, compress, store, and one transaction that ends it.

Nothing is visible before that transaction. Whatever ends the attempt early, its scratch folder and what it stored are
removed, and what the row says is decided by the fence: an attempt that lost its job changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import DBAPIError

from compression.errors import SlimtrimError
from compression.progress import Stage
from jobs.attempts import Claim, Success
from jobs.blocks import StoredFile
from jobs.database import UnitOfWork
from jobs.endings import Cause
from jobs.logs import Fields
from jobs.status import JobStatus
from jobs.storage import manifest_sha256, open_storage
from worker.blocks import BlockKeeper, Reply
from worker.faults import as_ours
from worker.figures import Watch
from worker.leash import Interrupted, Interruption, Leash
from worker.process import run_child
from worker.progress import EventWriter, Heartbeat
from worker.room import Room
from worker.workspace import Workspace, bare_environment, open_workspace

_STORING = 0.97
"""Progress at which storing begins."""


class Attempt:
    """A claimed job, until its end."""

    def __init__(self, room: Room, claim: Claim, leash: Leash, log: Fields) -> None:
        self._room, self._claim, self._leash, self._log = room, claim, leash, log
        self._events = EventWriter(room, claim, leash, log)
        self._watch = Watch(room, claim, log)
        self._grace_s = {
            Interruption.CANCEL: room.settings.cancel_grace_s,
            Interruption.DRAIN: room.settings.drain_grace_s,
        }
        self._prefix = f"artifacts/{claim.job_id}/a{claim.fence}/"

    def run(self) -> JobStatus | None:
        """Work until the end, whatever it is; return the job's status after it, None when the job was lost."""
        with self._watch, Heartbeat(self._room, self._claim, self._leash, self._log):
            try:
                status = self._publish(self._work())
            except Interrupted as interrupted:
                status = self._end_early(interrupted.reason)
            except SlimtrimError as error:
                status = self._fail(Cause(error.code, error.message, error.retryable))
            except DBAPIError:
                # The row is as it was; its lease will end, and the upkeep with it this attempt.
                self._log.exception("the database does not answer; giving up the attempt")
                status = None
            except Exception as error:
                self._log.exception("the attempt failed in the worker itself")
                ours = as_ours(error)
                status = self._fail(Cause(ours.code, ours.message, ours.retryable))
            self._watch.ended(status)
        if status is not JobStatus.SUCCEEDED:
            self._discard()
        return status

    def _work(self) -> Success:
        with open_workspace(self._room.settings, self._claim) as workspace:
            fetched = self._fetch(workspace)
            with BlockKeeper(self._room, self._claim, self._leash, self._log, workspace.parts, self._watch.stored) as keeper:
                answer = self._compress(workspace, fetched, keeper)
                keeper.settle()
                manifest = self._store(workspace, keeper.stored)
        result = {**answer["result"], "manifest_sha256": manifest_sha256(manifest)}
        return Success(result, answer["report"], manifest, self._prefix)

    def _fetch(self, workspace: Workspace) -> dict[str, Any]:
        """Return the model's ``folder``, and the ``texts`` that had to be fetched: source -> file."""
        self._stage("fetching", 0.0)
        work = {"request": self._request(), "destination": str(workspace.model), "texts": str(workspace.texts)}
        return self._run(["worker.errand", "fetch"], work, dict(os.environ))

    def _compress(self, workspace: Workspace, fetched: dict[str, Any], keeper: BlockKeeper) -> dict[str, Any]:
        places = {"out": workspace.out, "parts": workspace.parts, "studies": self._room.settings.studies_folder}
        work = {
            "request": self._request(), "model": fetched["folder"], "texts": fetched["texts"],
            "host_memory": self._room.settings.job_memory_bytes, "tasks": self._tasks(),
            **{name: str(place) for name, place in places.items()},
        }  # fmt: skip
        return self._run(["worker.child", "--run", self._room.entry], work, bare_environment(workspace), keeper)

    def _tasks(self) -> str | None:
        folder = self._room.settings.tasks_dir
        return None if folder is None else str(folder.resolve())

    def _request(self) -> dict[str, Any]:
        """Return the request with its branch pinned to the commit that was planned; a folder has none."""
        pinned = self._claim.resolved.get("revision")
        return self._claim.request if pinned is None else {**self._claim.request, "revision": pinned}

    def _store(self, workspace: Workspace, stored: Sequence[StoredFile]) -> Any:
        self._stage("uploading", _STORING)
        known = [{"key": file.key, "bytes": file.bytes, "sha256": file.sha256} for file in stored]
        work = {"prefix": self._prefix, "folder": str(workspace.out), "known": known}
        return self._run(["worker.errand", "store"], work, dict(os.environ))["manifest"]

    def _stage(self, stage: Stage, fraction: float) -> None:
        self._watch.stage(stage)
        self._events.stage(stage, fraction)

    def _run(
        self, arguments: list[str], work: dict[str, Any], environment: dict[str, str], keeper: BlockKeeper | None = None
    ) -> dict[str, Any]:
        work["log"] = {"service": arguments[0], **(self._log.extra or {})}
        look_on = self._watch.before(self._events.take)

        def hear(line: dict[str, Any], reply: Reply) -> None:
            if keeper is None or not keeper.take(line, reply):
                look_on(line)

        return run_child(
            arguments, work, self._leash, environment=environment, grace_s=self._grace_s, on_event=hear,
            memory_limit=work.get("host_memory", 0),
        )  # fmt: skip

    def _publish(self, success: Success) -> JobStatus | None:
        def write(work: UnitOfWork) -> JobStatus | None:
            if work.attempts.succeed(self._claim, success):
                return JobStatus.SUCCEEDED
            return work.attempts.cancel(self._claim)

        self._leash.check()
        return self._room.persist(write)

    def _end_early(self, reason: Interruption) -> JobStatus | None:
        match reason:
            case Interruption.LOST:
                return None
            case Interruption.CANCEL:
                return self._room.persist(lambda work: work.attempts.cancel(self._claim))
            case Interruption.DRAIN:
                return self._room.persist(self._release)
            case Interruption.OVERTIME:
                limit = f"the attempt ran longer than {self._claim.max_runtime_s} seconds"
                return self._fail(Cause("max_runtime", limit, retryable=False))

    def _release(self, work: UnitOfWork) -> JobStatus | None:
        status = work.attempts.release(self._claim)
        if status is JobStatus.QUEUED:
            work.outbox.append(self._claim.job_id)
        return status

    def _fail(self, cause: Cause) -> JobStatus | None:
        self._log.warning("attempt failed", extra={"code": cause.code, "reason": cause.message})
        # Later each time: a source or a disk that failed a moment ago will most likely fail again.
        backoff_s = self._room.settings.retry_backoff_s * 2 ** (self._claim.attempt - 1)
        return self._room.persist(lambda work: work.attempts.fail(self._claim, cause, backoff_s))

    def _discard(self) -> None:
        """Remove what this attempt stored, unless it is published: a commit may have happened whose answer got lost."""
        try:
            with self._room.work() as work:
                published = work.upkeep.is_published(self._claim.job_id, self._prefix)
            if not published:
                open_storage(self._room.settings).delete(self._prefix)
        except (DBAPIError, SlimtrimError):  # the maintenance loop finds what is left
            self._log.exception("stored files not removed")
