"""From a request to a queued job: find the model, plan, record, announce. What can never succeed is refused here."""

from __future__ import annotations

import hashlib
import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from api.errors import Problem
from api.schemas import JobRequest
from api.service import Service
from compression.plan import Plan, make_plan
from compression.planner.availability import check_request
from compression.planner.known import recall
from compression.request import Compression
from jobs.database import reading, unit_of_work
from jobs.errors import JobNotFound
from jobs.receivers import check_receiver
from jobs.repository import Added, Idempotency
from jobs.settings import Settings
from jobs.sources import check_text_sources, read_checkpoint_of
from jobs.tables import Job
from jobs.traces import current_parent

_PATH = "/v1/jobs"


def plan_request(request: JobRequest, settings: Settings) -> tuple[Plan, str | None]:
    """Return what would happen, and the commit that it was read from; reads config and tensor headers only."""
    if request.webhook is not None:
        check_receiver(request.webhook.url, settings.webhook_hosts)
    check_request(request)  # before anything is read: what is not built needs no answer from a hub
    check_text_sources(request, settings)
    checkpoint, revision = read_checkpoint_of(request.model, request.revision, settings)
    known = recall(settings.studies_folder, request, revision, checkpoint) if request.recipe == "auto" else None
    return make_plan(request, checkpoint, known), revision


def submit(service: Service, owner: str, request: JobRequest, key: str | None, request_id: str | None = None) -> Added:
    """Record a job and announce it, or return the one that the same key made before."""
    if service.draining.is_set():
        raise _draining()
    idempotency = None if key is None else Idempotency(owner, "POST", _PATH, key, _sha256(_as_json(request)))
    with service.in_flight.hold(idempotency):
        if idempotency is not None and (earlier := _replay(service, idempotency)) is not None:
            return earlier
        # The model is read before the transaction begins: a hub may take seconds, and writers wait for each other.
        plan, revision = plan_request(request, service.settings)
        job = _job(owner, request, plan, revision)
        job.request_id, job.trace_parent = request_id, current_parent()
        with unit_of_work(service.open_session, service.announce) as work:
            added = work.jobs.add(job, idempotency, queue_limit=service.settings.queue_limit)
            if not added.replayed:
                work.outbox.append(added.job.id)
    return added


def retry(service: Service, owner: str, job_id: str, key: str | None, request_id: str | None = None) -> Added:
    """Record a job that does what an ended one was to do, and announce it, or return the one that the same key made."""
    if service.draining.is_set():
        raise _draining()
    path = f"{_PATH}/{job_id}/retry"
    idempotency = None if key is None else Idempotency(owner, "POST", path, key, _sha256({"retry_of": job_id}))
    with service.in_flight.hold(idempotency):
        if idempotency is not None and (earlier := _replay(service, idempotency)) is not None:
            return earlier
        with unit_of_work(service.open_session, service.announce) as work:
            job = work.jobs.again(owner, job_id)
            job.resolved = {**job.resolved, "code_version": code_version()}
            job.request_id, job.trace_parent = request_id, current_parent()
            added = work.jobs.add(job, idempotency, queue_limit=service.settings.queue_limit)
            if not added.replayed:
                work.outbox.append(added.job.id)
    return added


def spec_hash(request: JobRequest, plan: Plan, revision: str | None) -> str:
    """Return the hash of what is to be computed: equal for jobs that would do the same work."""
    spec = {name: value for name, value in _as_json(request).items() if name in Compression.model_fields}
    spec |= {"recipe": {"steps": plan.model_dump(mode="json")["steps"]}, "revision": revision}
    return _sha256(spec)


@cache
def code_version() -> str:
    """Return this code's version, as its project file states it."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def _draining() -> Problem:
    return Problem("draining", "the service is stopping; send the request again in a moment")


def _replay(service: Service, idempotency: Idempotency) -> Added | None:
    with reading(service.open_reader) as work:
        try:
            earlier = work.jobs.replay(idempotency)
        except JobNotFound as error:
            raise Problem("not_found", "the job that this Idempotency-Key made has been deleted; use a fresh key") from error
    return None if earlier is None else Added(earlier, replayed=True)


def _job(owner: str, request: JobRequest, plan: Plan, revision: str | None) -> Job:
    hashed = spec_hash(request, plan, revision)
    return Job(
        owner=owner,
        model=request.model,
        request=_as_json(request),
        resolved={"revision": revision, "code_version": code_version(), "spec_hash": hashed},
        plan=plan.model_dump(mode="json"),
        memory_class=plan.memory_class,
        spec_hash=hashed,
        labels=request.labels,
        max_attempts=request.limits.max_attempts,
        max_runtime_s=request.limits.max_runtime_s,
        max_queue_s=request.limits.max_queue_s,
    )


def _as_json(request: JobRequest) -> dict[str, Any]:
    return request.model_dump(mode="json")


def _sha256(data: dict[str, Any]) -> str:
    """Hash data in one spelling: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
