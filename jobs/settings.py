"""The environment, read once into one frozen object. Every variable has the prefix ``SLIMTRIM_``.

``.env.example`` lists them all with these defaults. An empty variable counts as not set. An address of a kind that
is not known is refused at start-up by name, never ignored.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from compression.planner.sizes import MEMORY_CLASSES
from jobs.errors import SettingsRefused
from jobs.keys import ApiKey

PREFIX = "SLIMTRIM_"
_SCHEMES = {
    "database_url": ("sqlite:///", "postgresql://", "postgresql+psycopg://"),
    "broker_url": ("filesystem://", "redis://", "rediss://"),
    "storage_url": ("file:///", "s3://"),
}
"""What an address may begin with; the first is the embedded default's."""


def _split_folders(value: Any) -> Any:
    return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value


def _split_keys(value: Any) -> Any:
    return tuple(ApiKey.parse(part) for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _split_list(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _known_classes(classes: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := sorted(set(classes) - set(MEMORY_CLASSES)):
        raise ValueError(f"there is no memory class {', '.join(unknown)}; known are {', '.join(MEMORY_CLASSES)}")
    return classes


def _without_brackets(host: str) -> str:
    return host.strip("[]")  # as IPv6 addresses are written in URLs


Seconds = Annotated[float, Field(gt=0.0)]


class Settings(BaseSettings):
    """Everything that can be set. Built by ``load_settings``, or directly in tests."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    host: Annotated[str, AfterValidator(_without_brackets)] = Field(
        "127.0.0.1", description="Address to listen on. Other than loopback only when there are API keys."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    data_dir: Path = Field(Path("data"), description="The one folder for database, queue, artifacts and scratch space.")
    model_roots: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_folders)] = Field(
        (), description="Folders that file:// models and texts may be read from, colon-separated."
    )
    # The addresses of database and broker may hold passwords, so neither is shown with the rest.
    database_url: str | None = Field(
        None,
        repr=False,
        description="Where rows live, postgresql://user:password@host/name. Default: db.sqlite3 in SLIMTRIM_DATA_DIR.",
    )
    broker_url: str | None = Field(
        None,
        repr=False,
        description="How workers are woken, redis://host:6379/0. Default: the folder queue/ in SLIMTRIM_DATA_DIR.",
    )
    storage_url: str | None = Field(
        None,
        description="Where artifacts live, s3://bucket/prefix or file:///... Default: objects/ in SLIMTRIM_DATA_DIR.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="Address of the S3 server. Default: Amazon's. Credentials come from AWS_ACCESS_KEY_ID and its kin."
    )
    s3_public_url: str | None = Field(
        None, description="Address of the S3 server as callers reach it, for links. Default: SLIMTRIM_S3_ENDPOINT_URL."
    )
    s3_region: str = Field("us-east-1", description="Region that requests to S3 are signed for.")
    s3_checksums: Literal["when_required", "when_supported"] = Field(
        "when_required",
        description="When boto3 adds checksums; servers other than Amazon's may refuse when_supported.",
    )
    model_buckets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        (), description="What s3:// models and texts may be read from, comma-separated: bucket or bucket/prefix."
    )
    tasks_dir: Path | None = Field(
        None, description="Folder of benchmarks of your own for lm-evaluation-harness; what lies there may run code."
    )
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_split_keys)] = Field(
        (), description="Callers, comma-separated: name:scope+scope:sha256-of-key. Made by python -m jobs.keys entry NAME."
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token, for gated models.")
    secret: SecretStr | None = Field(
        None,
        description="Signs links and makes webhook secrets; equal on all machines. Default: a file in SLIMTRIM_DATA_DIR.",
    )
    rate_limit: int = Field(6000, ge=0, description="Requests that a caller may make per minute and API process; 0: any number.")
    queue_limit: int = Field(1000, ge=1, description="Jobs that a caller may have waiting.")
    stream_limit: int = Field(500, ge=1, description="Event streams that one API process holds open.")
    webhook_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        (), description="Hosts that webhooks may reach by http and at private addresses, comma-separated host:port."
    )
    worker_classes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list), AfterValidator(_known_classes)] = Field(
        (),
        description="Memory classes of the jobs that a worker takes, comma-separated. "
        "Default: what its device fits; in the embedded service without a GPU all.",
    )
    job_memory_bytes: int = Field(0, ge=0, description="Bytes of main memory that a job's process may use; 0: any number.")
    blocks_kept_s: Seconds = Field(604_800.0, description="Seconds for which finished blocks of unfinished jobs are kept.")
    workers: int = Field(1, ge=0, le=64, description="Worker processes that the embedded service starts.")
    lease_s: Seconds = Field(60.0, description="Seconds after which a silent worker has lost its job.")
    heartbeat_s: Seconds = Field(10.0, description="Seconds between two lease renewals; at most half of SLIMTRIM_LEASE_S.")
    cancel_grace_s: Seconds = Field(
        45.0, description="Seconds a cancelled job has to reach the end of its block, once its worker has noticed."
    )
    drain_grace_s: Seconds = Field(30.0, description="Seconds a worker that was told to stop gives its job.")
    retry_backoff_s: Seconds = Field(10.0, description="Seconds before a failed attempt is tried again; doubles each time.")
    announce_after_s: Seconds = Field(5.0, description="Seconds a queued job waits unclaimed before it is announced again.")
    maintenance_s: Seconds = Field(1.0, description="Seconds between two rounds of maintenance.")
    queue_poll_s: Seconds = Field(0.5, description="Seconds between two looks into the queue's folder.")
    min_free_bytes: int = Field(2**30, ge=0, description="Bytes that must stay free on the data folder's disk.")

    @model_validator(mode="after")
    def _available(self) -> Settings:
        for name, known in _SCHEMES.items():
            _refuse_other_schemes(name, getattr(self, name), known)
        return self

    @model_validator(mode="after")
    def _two_beats_in_a_lease(self) -> Settings:
        if 2 * self.heartbeat_s > self.lease_s:
            raise ValueError(f"heartbeat_s={self.heartbeat_s} leaves no room for a late beat in lease_s={self.lease_s}")
        return self

    @property
    def resolved_database_url(self) -> str:
        """The database's address, the default filled in."""
        if self.database_url is None:
            return f"sqlite:///{self.data_dir.resolve() / 'db.sqlite3'}"
        # One driver; without a name SQLAlchemy would look for another one.
        return self.database_url.replace("postgresql://", "postgresql+psycopg://", 1)

    @property
    def bucket(self) -> tuple[str, str] | None:
        """The bucket that holds the artifacts, and the prefix in it without slashes around; None for a folder."""
        if self.storage_url is None or not self.storage_url.startswith("s3://"):
            return None
        bucket, _, prefix = self.storage_url.removeprefix("s3://").partition("/")
        return bucket, prefix.strip("/")

    @property
    def queue_folder(self) -> Path:
        """The folder that carries the wake-up messages."""
        return self.data_dir.resolve() / "queue"

    @property
    def objects_folder(self) -> Path:
        """The folder that holds the artifacts."""
        if self.storage_url:
            return Path(self.storage_url.removeprefix("file://"))
        return self.data_dir.resolve() / "objects"

    @property
    def work_folder(self) -> Path:
        """The folder for the scratch space of running attempts."""
        return self.data_dir.resolve() / "work"

    @property
    def studies_folder(self) -> Path:
        """The folder in which workers keep their studies of models, for later jobs on the same."""
        return self.data_dir.resolve() / "studies"


def load_settings(**overrides: Any) -> Settings:
    """Return the settings of this environment, or raise ``SettingsRefused`` with a way out."""
    try:
        return Settings(**overrides)
    except ValidationError as refusal:
        lines = [f"{_variable(error['loc'])}: {error['msg'].removeprefix('Value error, ')}" for error in refusal.errors()]
        raise SettingsRefused("; ".join(lines)) from refusal


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the address. A name other than localhost may resolve to anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_other_schemes(name: str, url: str | None, known: tuple[str, ...]) -> None:
    # Bare "sqlite:///" would be a database in memory, and "s3://" no bucket.
    if url is None or (url.startswith(known) and url not in ("sqlite:///", "s3://")):
        return
    raise SettingsRefused(
        f"{PREFIX}{name.upper()} must start with {', '.join(known)} and name a place; unset it to use the embedded default"
    )


def _variable(location: tuple[int | str, ...]) -> str:
    return PREFIX + str(location[0]).upper() if location else "settings"


def describe_settings() -> Mapping[str, tuple[str, str]]:
    """Return variable -> (default as text, description), in order; what ``.env.example`` is made from."""
    return {
        PREFIX + name.upper(): (_as_text(field.default), field.description or "") for name, field in Settings.model_fields.items()
    }


def _as_text(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, cast("tuple[Any, ...]", default)))
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)
