"""Finished reports across a caller's jobs, in an order that a page can continue from.

A page continues after the last row's place in the order, not after a count of rows, so jobs that finish meanwhile
neither shift a later page nor hide a row from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from jobs.status import JobStatus
from jobs.tables import Job


class ReportOrder(StrEnum):
    """What comes first: what finished last, what is smallest, or what kept most."""

    NEWEST = "newest"
    BYTES = "bytes"
    RETENTION = "retention"


@dataclass(frozen=True, slots=True)
class ReportFilter:
    """What the list is narrowed to; a job without a measured retention passes no ``min_retention``."""

    model: str | None = None
    max_bytes: int | None = None
    min_retention: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands in an order: its value there, and its id among rows of the same value."""

    value: datetime | int | float
    job_id: str


class ReportRepository:
    """Jobs that have succeeded, as their results compare."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list(
        self, owner: str, only: ReportFilter, order: ReportOrder, *, limit: int, after: Place | None = None
    ) -> tuple[Sequence[Job], Place | None]:
        """Return jobs in this order, and the place after which the next page begins, if there is one."""
        key, falls = _ORDERS[order]
        where = [Job.owner == owner, Job.deleted_at.is_(None), Job.status == JobStatus.SUCCEEDED, *_narrowed(only)]
        if after is not None:
            beyond = key < after.value if falls else key > after.value
            where.append(or_(beyond, and_(key == after.value, Job.id < after.job_id)))
        query = select(Job, key).where(*where).order_by(key.desc() if falls else key.asc(), Job.id.desc()).limit(limit + 1)
        rows = self._session.execute(query).all()
        last = rows[limit - 1] if len(rows) > limit else None
        return [row[0] for row in rows[:limit]], None if last is None else Place(last[1], last[0].id)


_ORDERS: dict[ReportOrder, tuple[ColumnElement[Any], bool]] = {
    ReportOrder.NEWEST: (Job.finished_at, True),  # pyright: ignore[reportAssignmentType]
    ReportOrder.BYTES: (func.coalesce(Job.bytes_after, 2**62), False),
    # What was not measured comes last; a measured retention is above nothing.
    ReportOrder.RETENTION: (func.coalesce(Job.retention, -1.0), True),
}
"""Order -> what it compares, and whether it falls."""


def _narrowed(only: ReportFilter) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = []
    if only.model is not None:
        where.append(Job.model == only.model)
    if only.max_bytes is not None:
        where.append(Job.bytes_after <= only.max_bytes)
    if only.min_retention is not None:
        where.append(Job.retention >= only.min_retention)
    return where
