"""The environment, read once into one frozen object. Every variable has the prefix ``SLIMTRIM_``.

``.env.example`` lists them all with these defaults. An empty variable counts as not set. What a setting names but
this version cannot do (PostgreSQL, Redis, S3) is refused at start-up by name, never ignored.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from compression.errors import NotAvailable
from jobs.errors import SettingsRefused
from jobs.keys import ApiKey

PREFIX = "SLIMTRIM_"
_LATER = {"postgresql": "PostgreSQL", "postgres": "PostgreSQL", "redis": "Redis", "rediss": "Redis", "s3": "S3"}


def _split_folders(value: Any) -> Any:
    return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value


def _split_keys(value: Any) -> Any:
    return tuple(ApiKey.parse(part) for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _without_brackets(host: str) -> str:
    return host.strip("[]")  # as IPv6 addresses are written in URLs


Seconds = Annotated[float, Field(gt=0.0)]


class Settings(BaseSettings):
    """Everything that can be set. Built by ``load_settings``, or directly in tests."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    host: Annotated[str, AfterValidator(_without_brackets)] = Field(
        "127.0.0.1", description="Address to listen on. Other than loopback only with SLIMTRIM_API_KEYS."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    data_dir: Path = Field(Path("data"), description="The one folder for database, queue, artifacts and scratch space.")
    model_roots: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_folders)] = Field(
        (), description="Folders that file:// models and texts may be read from, colon-separated."
    )
    database_url: str | None = Field(None, description="Where rows live. Default: SQLite, db.sqlite3 in SLIMTRIM_DATA_DIR.")
    broker_url: str | None = Field(None, description="How workers are woken. Default: the folder queue/ in SLIMTRIM_DATA_DIR.")
    storage_url: str | None = Field(
        None, description="Where artifacts live, file:///... Default: the folder objects/ in SLIMTRIM_DATA_DIR."
    )
    s3_endpoint_url: str | None = Field(None, description="Address of an S3 server; has no use before S3 storage is available.")
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_split_keys)] = Field(
        (), description="Callers, comma-separated: name:scope+scope:sha256-of-key. Make one with python -m jobs.keys."
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token, for gated models.")
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
        for name, ours in (("database_url", "sqlite:///"), ("broker_url", "filesystem://"), ("storage_url", "file:///")):
            _refuse_other_schemes(name, getattr(self, name), ours)
        if self.s3_endpoint_url:
            raise NotAvailable(f"{PREFIX}S3_ENDPOINT_URL is set, but S3 storage is not available yet; unset it")
        return self

    @model_validator(mode="after")
    def _closed_without_keys(self) -> Settings:
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsRefused(
                f"{PREFIX}HOST={self.host} is reachable by others, and there are no API keys: anyone could run jobs. "
                f"Set {PREFIX}API_KEYS (python -m jobs.keys NAME makes one) or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _two_beats_in_a_lease(self) -> Settings:
        if 2 * self.heartbeat_s > self.lease_s:
            raise ValueError(f"heartbeat_s={self.heartbeat_s} leaves no room for a late beat in lease_s={self.lease_s}")
        return self

    @property
    def resolved_database_url(self) -> str:
        """The database's address, the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'db.sqlite3'}"

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
    """Return the settings of this environment, or raise ``SettingsRefused`` or ``NotAvailable`` with a way out."""
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


def _refuse_other_schemes(name: str, url: str | None, ours: str) -> None:
    if url is None or (url.startswith(ours) and url != "sqlite:///"):  # which would be a database in memory
        return
    scheme = url.partition("://")[0].partition("+")[0].lower()
    variable = PREFIX + name.upper()
    if scheme in _LATER:
        raise NotAvailable(f"{variable} names {_LATER[scheme]}, which is not available yet; unset it to use the embedded default")
    raise SettingsRefused(f"{variable} must start with {ours} and name a place; unset it to use the embedded default")


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
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)
