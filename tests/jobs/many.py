"""Thousands of waiting jobs, in a moment."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, insert, text

from jobs.ids import new_job_id
from jobs.status import JobStatus
from jobs.tables import Job

PLAN = {"blocks": [{"index": index, "action": "quantize", "experts_kept": 8, "bytes": 123_456_789} for index in range(32)]}
"""As long as a real plan is, so that a row takes the room that it takes in life."""


def queue_many(engine: Engine, count: int, owner: str = "ann", memory_class: str = "gpu.cpu") -> list[str]:
    """Insert queued jobs and return their ids, oldest first."""
    moment = datetime.now(UTC)
    fixed = {
        "owner": owner, "model": "m/m", "status": JobStatus.QUEUED, "request": {"model": "m/m"}, "plan": PLAN,
        "resolved": {"revision": None, "code_version": "0", "spec_hash": "0"},
        "spec_hash": "0", "memory_class": memory_class, "created_at": moment, "queued_at": moment,
        "queue_deadline": moment.replace(year=moment.year + 1), "last_seq": 1,
    }  # fmt: skip
    ids = sorted(new_job_id() for _ in range(count))
    with engine.begin() as connection:
        for start in range(0, count, 1000):
            part = enumerate(ids[start : start + 1000], start - count)
            announced = [{"id": job_id, "announced_at": moment + timedelta(milliseconds=number)} for number, job_id in part]
            connection.execute(insert(Job), [{**fixed, **row} for row in announced])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE"))
    return ids
