"""The queues: per memory class how many wait and run, who works, and when a new job would begin. Counts only, no ids."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.contract import problems
from api.dependencies import JobReader, Reader, refuse_unknown_parameters
from api.headers import require_accept
from api.schemas import QueueList, QueueStateView
from api.views import as_json
from compression.planner.sizes import MEMORY_CLASSES
from jobs.waiting_lines import Line
from jobs.workers import Present

router = APIRouter(tags=["queues"])


@router.get("/v1/queues", response_model=QueueList, responses=problems(401, 403, 422, 429))
def list_queues(request: Request, caller: JobReader, work: Reader) -> Response:
    """Say per memory class how many jobs wait and run, all callers' together, who works on them, and how long it takes."""
    require_accept(request.headers, "application/json")
    refuse_unknown_parameters(request)
    lines = work.queues.lines(list(MEMORY_CLASSES))
    workers = work.workers.all()
    return as_json(QueueList(data=[_state(name, line, workers) for name, line in lines.items()]))


def _state(name: str, line: Line, workers: Sequence[Present]) -> QueueStateView:
    alive = [worker for worker in workers if worker.is_alive and name in worker.classes]
    busy = sum(worker.is_busy for worker in alive)
    return QueueStateView(
        memory_class=name,
        queued=line.queued,
        running=line.running,
        oldest_wait_s=line.oldest_wait_s,
        workers_alive=len(alive),
        workers_busy=busy,
        run_time_p50_s=line.quantile(0.5),
        run_time_p90_s=line.quantile(0.9),
        eta_s=_eta(line, len(alive), len(alive) - busy),
    )


def _eta(line: Line, alive: int, free: int) -> float | None:
    """Estimate when a job that came now would begin: every worker alive takes the next job a median run after the last."""
    if alive == 0:
        return None
    if line.queued < free:
        return 0.0
    typical = line.quantile(0.5)
    return None if typical is None else ((line.queued - free) // alive + 1) * typical
