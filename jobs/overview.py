"""A job as a list shows it: some columns, and of its documents only what a row of the list says.

A plan may have hundreds of blocks and a frontier; it is never sent from the database, let alone parsed, for a list. SQL
takes the two figures out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Row, Select, select, type_coerce

from jobs.status import TERMINAL, JobStatus
from jobs.tables import Document, Job


@dataclass(frozen=True, slots=True)
class Overview:
    """One row of a list of jobs."""

    id: str
    model: str
    status: JobStatus
    stage: str | None
    progress: Document
    retention: float | None
    labels: Document
    created_at: datetime
    version: int
    """Grows with every change that a caller can see."""
    bytes_before: int | None
    bytes_after: int | None
    """Of the artifact; of the plan while there is no artifact (``is_planned``)."""
    is_planned: bool

    @property
    def is_over(self) -> bool:
        """Whether the status is terminal."""
        return self.status in TERMINAL


@dataclass(frozen=True, slots=True)
class OverviewPage:
    """Some rows, newest first, and the cursor that continues after the last."""

    rows: list[Overview]
    next_cursor: str | None


def overviews() -> Select[*tuple[Any, ...]]:
    """Return the query for the columns that a row shows."""
    plan = type_coerce(Job.plan, JSON)
    # As text, because a size does not fit the integer that PostgreSQL would make of it.
    return select(
        Job.id, Job.model, Job.status, Job.stage, Job.progress, Job.retention, Job.labels, Job.created_at, Job.version,
        Job.bytes_after, plan["bytes_before"].as_string().label("before"), plan["bytes_after"].as_string().label("planned"),
    )  # fmt: skip


def overview_of(row: Row[*tuple[Any, ...]]) -> Overview:
    """Return what the query found."""
    columns: dict[str, Any] = dict(row._mapping)  # pyright: ignore[reportPrivateUsage] (SQLAlchemy means it for everybody)
    before, planned, after = columns.pop("before"), columns.pop("planned"), columns.pop("bytes_after")
    expected = None if planned is None else int(planned)
    return Overview(
        **columns,
        bytes_before=None if before is None else int(before),
        bytes_after=expected if after is None else after,
        is_planned=after is None,
    )
