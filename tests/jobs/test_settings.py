"""What the environment may say, what it means, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.errors import SettingsRefused
from jobs.keys import SCOPES, ApiKey, digest, new_key
from jobs.settings import Settings, describe_settings, is_loopback, load_settings

EXAMPLE = Path(__file__).resolve().parents[2] / ".env.example"
CONTRACT = {
    "HOST", "PORT", "DATA_DIR", "MODEL_ROOTS", "DATABASE_URL", "BROKER_URL", "STORAGE_URL", "S3_ENDPOINT_URL", "API_KEYS",
    "HF_TOKEN", "LEASE_S", "HEARTBEAT_S",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in describe_settings():
        monkeypatch.delenv(name, raising=False)


def test_the_example_lists_every_setting_with_its_default_and_what_it_means():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    listed = {
        line.partition("=")[0]: (line.partition("=")[2], lines[index - 1].removeprefix("# "))
        for index, line in enumerate(lines)
        if line.startswith("SLIMTRIM_")
    }

    assert listed == describe_settings()
    assert list(listed) == list(describe_settings())


def test_the_example_loaded_as_it_is_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    for name, value in re.findall(r"^(SLIMTRIM_\w+)=(.*)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE):
        monkeypatch.setenv(name, value)

    from_example = load_settings()
    monkeypatch.undo()

    assert from_example == Settings.model_construct(**Settings().model_dump())


def test_every_setting_of_the_contract_exists():
    assert {f"SLIMTRIM_{name}" for name in CONTRACT} <= set(describe_settings())
    assert (Settings().host, Settings().port, Settings().lease_s, Settings().heartbeat_s) == ("127.0.0.1", 8000, 60.0, 10.0)


def test_production_parts_are_named_by_their_addresses():
    url = "postgresql://u:p@127.0.0.1/db"
    settings = load_settings(database_url=url, broker_url="rediss://127.0.0.1:6379/0", storage_url="s3://bucket/a/b/")

    assert settings.resolved_database_url == "postgresql+psycopg://u:p@127.0.0.1/db"
    assert settings.bucket == ("bucket", "a/b")
    assert load_settings(storage_url="s3://bucket").bucket == ("bucket", "")
    assert load_settings(storage_url="file:///srv/objects").bucket is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://127.0.0.1/db"),
        ("DATABASE_URL", "sqlite:///"),
        ("BROKER_URL", "memory"),
        ("DATABASE_URL", "postgres://127.0.0.1/db"),
        ("STORAGE_URL", "/srv/objects"),
        ("STORAGE_URL", "s3://"),
        ("WORKER_CLASSES", "gpu.16g,gpu.17g"),
        ("S3_CHECKSUMS", "never"),
        ("PORT", "eighty"),
        ("LEASE_S", "0"),
        ("HEARTBEAT_S", "31"),
        ("API_KEYS", "ann:all:nothex"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(f"SLIMTRIM_{name}", value)

    with pytest.raises(SettingsRefused, match=name if name != "HEARTBEAT_S" else "heartbeat_s"):
        load_settings()


def test_this_machine_alone_reaches_a_loopback_address():
    hosts = ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]", "0.0.0.0", "::", "192.0.2.1", "example.org")

    assert [host for host in hosts if is_loopback(host)] == ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"]


def test_folders_are_separated_by_colons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIMTRIM_MODEL_ROOTS", "/srv/a:/srv/b c:")

    assert load_settings().model_roots == (Path("/srv/a"), Path("/srv/b c"))


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch):
    for name in describe_settings():
        monkeypatch.setenv(name, "")

    assert load_settings() == Settings.model_construct(**Settings().model_dump())


def test_settings_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Settings().port = 1


def test_a_key_is_kept_as_its_hash_and_recognised():
    key, entry = new_key("ann", ["jobs:read", "reports:read"])

    kept = ApiKey.parse(entry)

    assert key not in entry
    assert len(key) > 40
    assert kept == ApiKey("ann", frozenset({"jobs:read", "reports:read"}), digest(key))
    assert kept.matches(key)
    assert not kept.matches(key[:-1])
    assert ApiKey.parse(f"bob:all:{digest(key)}").scopes == frozenset(SCOPES)


@pytest.mark.parametrize("entry", ["ann", "ann:jobs:read", f"ann:jobs:fly:{'0' * 64}", f"a n:all:{'0' * 64}", f":all:{'0' * 64}"])
def test_a_malformed_key_entry_is_refused(entry: str):
    with pytest.raises(ValueError, match="API key"):
        ApiKey.parse(entry)


def test_passwords_in_addresses_do_not_show():
    urls = {"database_url": "postgresql://u:canary@h/d", "broker_url": "redis://:canary@h:1/0"}

    assert "canary" not in repr(Settings(**urls)) + str(Settings(**urls))
    with pytest.raises(SettingsRefused) as refusal:
        load_settings(database_url="mysql://u:canary@h/d")
    assert "canary" not in str(refusal.value)
    with pytest.raises(ValidationError) as raw:
        Settings(**urls, port="canary")
    assert "canary" not in str(raw.value)


def test_a_token_does_not_show():
    settings = Settings(hf_token="hf_secretsecret")

    assert "hf_secret" not in repr(settings)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_secretsecret"
