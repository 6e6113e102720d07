"""Finished parts of runs that outlive their attempts: rows that say which files there are, written under the fence.

A part is known by what it depends on (its fingerprint), not by its job: a later attempt, a retry, or another job of the same
caller that asks for the same finds it. Files lie below ``blocks/<owner>/<fingerprint>/<job>/a<fence>/``, so that no attempt can
alter what another one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.endings import Hold
from jobs.status import HELD, TERMINAL, JobStatus
from jobs.tables import Document, Job, JobBlock

ROOT = "blocks"
_ROUND = 200


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a part: its name, and the object that holds it."""

    path: str
    key: str
    bytes: int
    sha256: str


def prefix_of(owner: str, fingerprint: str) -> str:
    """Return what the keys of a fingerprint's files begin with."""
    return f"{ROOT}/{owner}/{fingerprint}/"


class BlockRepository:
    """Which finished parts there are."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def keep(self, hold: Hold, owner: str, fingerprint: str, name: str, files: Sequence[StoredFile]) -> bool:
        """Record a part whose files are stored; False when the hold is lost. One that is there already stays as it is."""
        mine = Job.id == hold.job_id, Job.fence == hold.fence, Job.status.in_(HELD)
        if self._session.scalar(select(Job.id).where(*mine).with_for_update()) is None:
            return False
        documents: list[Document] = [
            {"path": file.path, "key": file.key, "bytes": file.bytes, "sha256": file.sha256} for file in files
        ]
        row = JobBlock(
            owner=owner, fingerprint=fingerprint, name=name, job_id=hold.job_id, fence=hold.fence, files={"files": documents}
        )  # fmt: skip
        try:
            with self._session.begin_nested():
                self._session.add(row)
        except IntegrityError:  # the primary key: somebody else has finished the same part
            return True
        return True

    def find(self, owner: str, fingerprint: str) -> Mapping[str, Sequence[StoredFile]]:
        """Return the finished parts of a fingerprint by name."""
        query = select(JobBlock).where(JobBlock.owner == owner, JobBlock.fingerprint == fingerprint).order_by(JobBlock.name)
        rows = self._session.scalars(query).all()
        return {row.name: [StoredFile(**file) for file in row.files["files"]] for row in rows}

    def begin(self, hold: Hold, fingerprint: str) -> bool:
        """Note what the attempt's blocks are kept under; False when the hold is lost."""
        job = self._session.scalar(select(Job).where(Job.id == hold.job_id, Job.fence == hold.fence, Job.status.in_(HELD)))
        if job is None:
            return False
        job.fingerprint = fingerprint
        return True

    def forget_stale(self, kept_s: float) -> list[str]:
        """Drop the rows of parts that nobody will ask for any more; return what the keys of their files begin with.

        That is when no job that is not over works on them, and either one has succeeded or the last part is ``kept_s`` old.
        """
        same = Job.owner == JobBlock.owner, Job.fingerprint == JobBlock.fingerprint
        wanted = exists().where(*same, Job.status.not_in(TERMINAL))
        served = exists().where(*same, Job.status == JobStatus.SUCCEEDED)
        old = func.max(JobBlock.created_at) < now(-kept_s)
        group = JobBlock.owner, JobBlock.fingerprint
        query = select(*group).where(~wanted).group_by(*group).having(or_(old, served)).limit(_ROUND)
        gone = [(owner, fingerprint) for owner, fingerprint in self._session.execute(query)]
        for owner, fingerprint in gone:
            self._session.execute(delete(JobBlock).where(JobBlock.owner == owner, JobBlock.fingerprint == fingerprint))
        return [prefix_of(owner, fingerprint) for owner, fingerprint in gone]

    def kept_of(self, job_id: str, fence: int, prefix: str) -> set[str]:
        """Return the names of the parts below this prefix of ``prefix_of`` whose files this attempt stored."""
        _, owner, fingerprint = prefix.rstrip("/").split("/")
        mine = JobBlock.job_id == job_id, JobBlock.fence == fence
        place = JobBlock.owner == owner, JobBlock.fingerprint == fingerprint
        return set(self._session.scalars(select(JobBlock.name).where(*mine, *place)))
