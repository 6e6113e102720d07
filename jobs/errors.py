"""What can go wrong around a job, apart from the compression itself. Same tree, same ``code`` and ``retryable``."""

from __future__ import annotations

from compression.errors import RequestError, RunError, SlimtrimError


class JobNotFound(RequestError):
    """No such job, or it belongs to another caller, or it was deleted."""

    code = "not_found"


class JobActive(RequestError):
    """The job has not ended yet, and what was asked needs that it has."""

    code = "job_active"


class JobFinished(RequestError):
    """The job has succeeded, and what was asked needs that it has not."""

    code = "job_finished"


class QueueFull(RequestError):
    """The caller has as many jobs waiting as it may."""

    code = "queue_full"
    retryable = True


class ReceiverRefused(RequestError):
    """A webhook's url leads where nothing is sent."""

    code = "validation_failed"


class IdempotencyKeyReused(RequestError):
    """The caller used the same ``Idempotency-Key`` before, with another body."""

    code = "idempotency_key_reused"


class IllegalMove(SlimtrimError):
    """A status change that the contract does not know. Always a mistake of ours."""


class StorageUnavailable(RunError):
    """The artifact store did not take or give what it should; it may later."""

    code = "storage_unavailable"
    retryable = True


class WorkerLost(RunError):
    """The process that worked on the job died or fell silent."""

    code = "worker_lost"
    retryable = True


class RuntimeExceeded(RunError):
    """The attempt ran longer than ``limits.max_runtime_s``."""

    code = "max_runtime"


class SettingsRefused(SlimtrimError):
    """The environment asks for a service that cannot be started as it stands."""

    code = "invalid_settings"


class DataFolderBusy(SlimtrimError):
    """Another process already serves this data folder."""

    code = "data_folder_busy"


class SchemaOutOfDate(SlimtrimError):
    """The database's schema is not the one that this code was written for."""

    code = "schema_out_of_date"


class DeviceRefused(SlimtrimError):
    """The worker cannot have the accelerator that it would work on."""

    code = "device_refused"
