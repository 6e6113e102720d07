"""What the service answers, as types over plain dictionaries.

A document is what ``json`` made of the answer: fields that this version does not know stay in it, and nothing is refused
because of them. The types name what the contract promises.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled", "expired"]
OVER = frozenset({"succeeded", "failed", "cancelled", "expired"})
"""Statuses that never change again."""
LAST_EVENTS = frozenset(f"job.{status}" for status in OVER)
"""Types of event after which a job has no further one."""

Body = dict[str, Any]
"""What is posted: ``{"model": ..., "target_memory": "20GB", ...}``."""
Report = dict[str, Any]
"""What was done to a model and what it cost; ``schema_version`` says which fields there are."""


class StatusReason(TypedDict):
    """Why a job is where it is."""

    code: str
    message: str
    retryable: bool


class Progress(TypedDict):
    """How far the present attempt is."""

    fraction: float
    block: int | None
    blocks: int | None
    message: str | None
    eta_at: str | None


class Result(TypedDict):
    """What came out, measured."""

    bytes_before: int
    bytes_after: int
    ratio: float
    retention: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    divergence: float | None
    verified: bool
    manifest_sha256: str


class PlanWarning(TypedDict):
    """Something to know that does not stop the run."""

    code: str
    message: str


class Plan(TypedDict):
    """What a request would do; sizes in bytes."""

    feasible: bool
    profile: str
    bytes_before: int
    bytes_after: int
    smallest_possible_bytes: int
    target_bytes: int | None
    memory_class: str
    steps: list[dict[str, Any]]
    components: dict[str, int]
    memory: dict[str, int]
    blocks: list[dict[str, Any]]
    predicted_loss: float | None
    frontier: list[dict[str, Any]]
    provisional: bool
    warnings: list[PlanWarning]


class Job(TypedDict):
    """A job; ``None`` stands for what is not known yet."""

    id: str
    object: Literal["job"]
    status: Status
    stage: str | None
    status_reason: StatusReason | None
    progress: Progress
    request: dict[str, Any]
    resolved: dict[str, Any]
    plan: Plan | None
    result: Result | None
    attempt: int
    max_attempts: int
    queue: dict[str, Any] | None
    labels: dict[str, str]
    retry_of: str | None
    created_at: str
    queued_at: str
    started_at: str | None
    cancelling_at: str | None
    finished_at: str | None
    links: dict[str, str]


class JobList(TypedDict):
    """One page of jobs, newest first."""

    object: Literal["list"]
    data: list[Job]
    has_more: bool
    next_cursor: str | None


class Event(TypedDict):
    """Something that happened to a job; ``seq`` counts from 1."""

    seq: int
    type: str
    at: str
    data: dict[str, Any]


class ManifestFile(TypedDict):
    """One file of an artifact; ``url`` needs no key and is good for minutes."""

    path: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class Manifest(TypedDict):
    """Every file of an artifact."""

    files: list[ManifestFile]
    bytes: int
    profile: str
    expires_at: str


def is_over(job: Job) -> bool:
    """Say whether the job will never change again."""
    return job["status"] in OVER
