"""Places in the queue, how the classes stand, and that ten thousand waiting jobs change nothing for the others."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event

from jobs.status import JobStatus
from tests.jobs.conftest import OWNER, SUCCESS, Rows
from tests.jobs.many import queue_many


def test_a_place_counts_who_came_before_in_the_same_class(rows: Rows):
    first, other, second = rows.add(), rows.add(memory_class="gpu.16g"), rows.add("bob")
    third, running = rows.add(), rows.claimed().job_id

    jobs = [rows.job(job_id) for job_id in (first, other, second, third, running)]
    with rows.work() as work:
        together, alone = work.queues.places(jobs), [work.queues.places([job]) for job in jobs]

    assert together == {first: 0, other: 0, second: 1, third: 2}
    assert alone == [{first: 0}, {other: 0}, {second: 1}, {third: 2}, {}]


def test_a_page_of_waiting_jobs_costs_two_queries_however_long_the_line_is(rows: Rows):
    queue_many(rows.engine, 200)
    asked = list[str]()
    event.listen(rows.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))

    page = rows.do(lambda work: work.jobs.list(OWNER, limit=100)).jobs
    before = len(asked)
    places = rows.do(lambda work: work.queues.places(page))

    assert [places[job.id] for job in page] == list(range(199, 99, -1))
    assert len([statement for statement in asked[before:] if statement.startswith("SELECT")]) == 2


def test_a_page_with_gaps_and_two_classes_is_numbered_as_each_job_alone(rows: Rows):
    ids = [rows.add(memory_class=name) for name in ("gpu.16g", "gpu.80g", "gpu.16g", "gpu.16g", "gpu.80g", "gpu.16g")]
    page = [job for job in rows.do(lambda work: work.jobs.list(OWNER)).jobs if job.id in (ids[2], ids[4], ids[5])]

    places = rows.do(lambda work: work.queues.places(page))
    alone = [rows.do(lambda work, job=job: work.queues.places([job])) for job in page]

    assert places == {ids[2]: 1, ids[4]: 1, ids[5]: 3}
    assert {job_id: place for one in alone for job_id, place in one.items()} == places


def test_classes_stand_as_their_jobs_do(rows: Rows):
    oldest = rows.add(memory_class="gpu.16g")
    rows.add(memory_class="gpu.16g")
    rows.claimed(memory_class="gpu.16g")
    done = rows.claimed(memory_class="gpu.16g")
    rows.do(lambda work: work.attempts.succeed(done, SUCCESS))
    failed = rows.claimed(memory_class="gpu.80g")
    rows.do(lambda work: work.jobs.request_cancel(OWNER, failed.job_id))

    lines = rows.do(lambda work: work.queues.lines(["gpu.cpu", "gpu.16g", "gpu.80g"]))

    assert {name: (line.queued, line.running) for name, line in lines.items()} == {
        "gpu.cpu": (0, 0), "gpu.16g": (2, 1), "gpu.80g": (0, 1),
    }  # fmt: skip
    assert lines["gpu.16g"].oldest_since == rows.job(oldest).queued_at
    assert lines["gpu.16g"].oldest_wait_s is not None
    assert lines["gpu.cpu"].oldest_wait_s is None
    (attempt,) = rows.attempts(done.job_id)
    assert attempt.ended_at is not None
    assert lines["gpu.16g"].run_times_s == [(attempt.ended_at - attempt.started_at).total_seconds()]
    assert lines["gpu.80g"].quantile(0.5) is None


def test_with_ten_thousand_waiting_every_statement_goes_through_an_index(rows: Rows):
    """What a worker, a caller and the upkeep ask every second; a plan that reads the whole table says so."""
    ids = queue_many(rows.engine, 10_000)
    asked = list[tuple[str, Any]]()
    event.listen(rows.engine, "before_cursor_execute", lambda *call: asked.append((call[2], call[3])))

    claim = rows.claim(ids[5000])
    assert claim is not None
    rows.do(lambda work: (work.attempts.renew(claim, 60.0), work.attempts.succeed(claim, SUCCESS)))
    rows.do(lambda work: work.queues.places([work.jobs.get(OWNER, ids[100])]))
    rows.do(lambda work: (work.upkeep.expire_leases(), work.upkeep.expire_runtimes(0.0), work.upkeep.expire_queued()))
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", 60.0, 16)) == []
    assert rows.do(lambda work: work.upkeep.next_claimable("gpu.cpu", -60.0, 2)) == ids[:2]

    assert len(asked) > 10
    assert [statement for statement, values in asked if reads_every_job(rows, statement, values)] == []
    assert rows.job(ids[5000]).status == JobStatus.SUCCEEDED


DEADLINES = ("queue_deadline", "announced_at")


def reads_every_job(rows: Rows, statement: str, values: Any) -> bool:
    if not statement.startswith(("SELECT", "UPDATE")) or "jobs" not in statement:
        return False
    explain = "EXPLAIN" if rows.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with rows.engine.connect() as connection:
        plan = "\n".join(str(row) for row in connection.exec_driver_sql(f"{explain} {statement}", values))
    # A deadline that is compared after the index was walked is compared in every waiting row.
    compared = [line for line in plan.splitlines() if "Filter:" in line]
    if "Seq Scan on jobs" in plan or any(name in line for line in compared for name in DEADLINES):
        return True
    # SQLite says SCAN for a whole table and for a whole index; the latter is called COVERING where no row is read.
    return any("SCAN jobs" in line and "INDEX" not in line for line in plan.splitlines())
