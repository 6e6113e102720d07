"""Speaks with a slimtrim service, from Python (``Client``, ``AsyncClient``) and from the shell (``slimtrim``)."""

from slimtrim_client.aio import AsyncClient
from slimtrim_client.client import Client
from slimtrim_client.connection import __version__
from slimtrim_client.documents import Body, Event, Job, JobList, Manifest, ManifestFile, Plan, Report, is_over
from slimtrim_client.downloads import Download, DownloadedFile
from slimtrim_client.errors import (
    BadInput,
    CannotWrite,
    Damaged,
    DiskFull,
    JobFailed,
    JobStopped,
    Problem,
    Refused,
    RetentionTooLow,
    SlimtrimError,
    TookTooLong,
    Unavailable,
    UnexpectedAnswer,
    Unreachable,
    UnsafeManifest,
)
from slimtrim_client.outcomes import problem_of, require_success
from slimtrim_client.retries import Patience

__all__ = [
    "AsyncClient",
    "BadInput",
    "Body",
    "CannotWrite",
    "Client",
    "Damaged",
    "DiskFull",
    "Download",
    "DownloadedFile",
    "Event",
    "Job",
    "JobFailed",
    "JobList",
    "JobStopped",
    "Manifest",
    "ManifestFile",
    "Patience",
    "Plan",
    "Problem",
    "Refused",
    "Report",
    "RetentionTooLow",
    "SlimtrimError",
    "TookTooLong",
    "Unavailable",
    "UnexpectedAnswer",
    "Unreachable",
    "UnsafeManifest",
    "__version__",
    "is_over",
    "problem_of",
    "require_success",
]
