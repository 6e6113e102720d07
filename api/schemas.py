"""What comes in and what goes out, as types; the published OpenAPI document is made from them.

``JobRequest`` is the library's ``Compression`` and what only a service needs: limits, labels, a webhook. Every field of
an answer is always present, ``null`` while it is unknown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from compression.recipe import Settings
from compression.request import Compression
from jobs.status import JobStatus

MOST_LABELS = 16
LabelName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-/]+$")]
LabelValue = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
WebhookEvent = Literal[
    "job.created", "job.started", "job.attempt_failed", "job.cancelled", "job.succeeded", "job.failed", "job.expired"
]


class Limits(Settings):
    """How long a job may wait and run, and how often it is tried."""

    max_runtime_s: Annotated[int, Field(ge=1, le=30 * 86_400)] = 86_400
    max_queue_s: Annotated[int, Field(ge=1, le=365 * 86_400)] = 604_800
    max_attempts: Annotated[int, Field(ge=1, le=100, description="Attempts in a row that made no block durable.")] = 3


class Webhook(Settings):
    """Whom to tell, by signed POSTs as Standard Webhooks 1.0 describes them; at least once, in no promised order."""

    url: Annotated[
        str,
        StringConstraints(min_length=1, max_length=2048, pattern=r"^https?://"),
        Field(description="https on port 443 at a public address, without user and password, or what the operator lists."),
    ]
    events: Annotated[tuple[WebhookEvent, ...], Field(min_length=1)] = ("job.succeeded", "job.failed")


class JobRequest(Compression):
    """The body of POST /v1/jobs and POST /v1/plans."""

    limits: Limits = Limits()
    webhook: Webhook | None = None
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=MOST_LABELS, default_factory=dict)]


class View(BaseModel):
    """Part of an answer; every field is present."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)


NAMED = "x-schema"
"""Marks a place where the published document refers to a schema by name."""


class StoredView(View):
    """Part of a row; a worker of a later version may have put more into it."""

    model_config = ConfigDict(frozen=True, extra="allow", json_schema_serialization_defaults_required=True)


def _described_as(name: str) -> WithJsonSchema:
    """Stored documents were checked when they were made; the schema says what they are."""
    return WithJsonSchema({"type": "object", NAMED: name})


RequestDocument = Annotated[dict[str, Any], _described_as("JobRequest")]
PlanDocument = Annotated[dict[str, Any], _described_as("Plan")]


class StatusReason(StoredView):
    """Why a job is where it is, when that is not plain."""

    code: str
    message: str
    retryable: bool


class ProgressView(StoredView):
    """How far the present attempt is; ``fraction`` never goes back within an attempt."""

    fraction: float
    block: int | None
    blocks: int | None
    message: str | None
    eta_at: str | None


class ResolvedView(StoredView):
    """What the request was pinned to when the job was created."""

    revision: str | None
    code_version: str
    spec_hash: str


class Measured(View):
    """What became of a model, in figures."""

    bytes_before: int
    bytes_after: int
    ratio: float
    retention: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    divergence: float | None


class ResultView(Measured):
    """What came out, measured."""

    model_config = StoredView.model_config

    verified: bool
    manifest_sha256: str


class QueueView(View):
    """Where a queued job stands."""

    memory_class: Annotated[str | None, Field(serialization_alias="class", validation_alias="class")]
    position: int
    waiting_for: str


class QueueStateView(View):
    """How one memory class stands; a worker that takes several classes is counted in each."""

    memory_class: Annotated[str, Field(serialization_alias="class")]
    queued: int
    running: int
    oldest_wait_s: float | None
    workers_alive: int
    workers_busy: int
    run_time_p50_s: float | None
    run_time_p90_s: float | None
    """Of the attempts that succeeded last, 50 at most."""
    eta_s: Annotated[float | None, Field(description="Seconds until a job that came now would begin, estimated; null: unknown.")]


class QueueList(View):
    """Every memory class, the smallest first."""

    object: Literal["list"] = "list"
    data: list[QueueStateView]


class Links(View):
    """References relative to the service's root."""

    self: str
    events: str
    report: str
    artifact: str
    cancel: str


class JobView(View):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    stage: str | None
    status_reason: StatusReason | None
    progress: ProgressView
    request: RequestDocument
    resolved: ResolvedView
    plan: PlanDocument | None
    result: ResultView | None
    attempt: int
    max_attempts: int
    queue: QueueView | None
    labels: dict[str, str]
    retry_of: str | None
    created_at: str
    queued_at: str
    started_at: str | None
    cancelling_at: str | None
    finished_at: str | None
    links: Links


class JobList(View):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool
    next_cursor: str | None


class EventView(View):
    """Something that happened to a job; ``seq`` counts from 1 without gaps."""

    seq: int
    type: str
    at: str
    data: dict[str, Any]


class EventList(View):
    """One page of events, oldest first."""

    object: Literal["list"] = "list"
    data: list[EventView]
    has_more: bool
    next_cursor: int | None


class ReportLinks(View):
    """References relative to the service's root."""

    job: str
    report: str
    artifact: str


class ReportSummary(Measured):
    """What a finished job made of its model; its whole report is at ``links.report``."""

    id: Annotated[str, Field(description="The job's.")]
    object: Literal["report"] = "report"
    model: str
    recipe: Annotated[Any, Field(description='"auto" or the steps, as in the request.')]
    profile: str
    target_memory: int | None
    labels: dict[str, str]
    finished_at: str
    links: ReportLinks


class ReportList(View):
    """One page of reports."""

    object: Literal["list"] = "list"
    data: list[ReportSummary]
    has_more: bool
    next_cursor: str | None


class ArtifactFile(View):
    """One file of an artifact; ``url`` needs no key until ``expires_at``."""

    path: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class ArtifactView(View):
    """Every file of an artifact."""

    files: list[ArtifactFile]
    bytes: int
    profile: str
    expires_at: str


class StepView(View):
    """One kind of step: whether it can be used today, its settings, and what is known about it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    summary: str
    available: bool
    paper: str
    evidence: str
    explanation: str


class StepList(View):
    """Every step of the contract."""

    object: Literal["list"] = "list"
    data: list[StepView]


class ArchitectureView(View):
    """One supported ``model_type``."""

    model_type: str
    expert_count_keys: list[str]
    shared_experts: bool
    group_limited_routing: bool
    latent_attention: bool
    fused_experts: bool
    quantize: bool
    refuses: dict[str, str] = Field(description="What is not done to this family, each with the reason.")


class ArchitectureList(View):
    """Every supported architecture."""

    object: Literal["list"] = "list"
    data: list[ArchitectureView]


class Check(View):
    """One thing that readiness depends on."""

    ok: bool
    required: bool
    detail: str


class Health(View):
    """Whether the service can do its work."""

    status: Literal["alive", "ready", "not_ready"]
    checks: dict[str, Check] = {}


class Fault(BaseModel):
    """One thing wrong with the request; ``parameter`` instead of ``pointer`` for a query parameter."""

    pointer: str | None
    code: str
    detail: str
    parameter: str | None = None


class ProblemView(BaseModel):
    """RFC 9457, with a stable ``code``."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    errors: list[Fault] | None = None
