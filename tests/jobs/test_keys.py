"""Keys in the database and in the settings: made, shown once, ended; and an address that others reach needs one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import select

from jobs.errors import SettingsRefused
from jobs.key_commands import main
from jobs.key_rows import require_keys
from jobs.keys import SCOPES, ApiKey, digest, new_key
from jobs.settings import Settings, load_settings
from jobs.tables import ApiKeyRow
from tests.jobs.conftest import Rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def commands(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The rows on which the command line works."""
    monkeypatch.setenv("SLIMTRIM_DATA_DIR", str(rows.settings.data_dir))
    monkeypatch.setenv("SLIMTRIM_DATABASE_URL", rows.engine.url.render_as_string(hide_password=False))
    return rows


def found(rows: Rows, key: str):
    return rows.do(lambda work: work.keys.find(digest(key)))


def test_a_key_is_found_by_what_it_is_until_it_is_revoked(rows: Rows):
    key, row = rows.do(lambda work: work.keys.create("ann", ["jobs:read"]))

    known = found(rows, key)
    assert known is not None
    assert (known.owner, known.scopes) == ("ann", frozenset({"jobs:read"}))
    assert found(rows, key[:-1]) is None
    assert rows.do(lambda work: work.keys.revoke(row.id))
    assert found(rows, key) is None
    assert not rows.do(lambda work: work.keys.revoke(row.id)), "only once"


def test_a_key_ends_with_its_days(rows: Rows):
    lasting, _ = rows.do(lambda work: work.keys.create("ann", days=1))
    over, _ = rows.do(lambda work: work.keys.create("ann", days=-1))

    assert found(rows, lasting) is not None
    assert found(rows, over) is None


def test_the_key_itself_is_in_no_row_and_no_file(rows: Rows):
    key, _ = rows.do(lambda work: work.keys.create("ann"))

    with rows.open_reader() as session:
        kept = repr(session.execute(select(*ApiKeyRow.__table__.columns)).all())
    assert digest(key) in kept
    assert key not in kept
    assert all(key.encode() not in path.read_bytes() for path in rows.settings.data_dir.rglob("*") if path.is_file())


def test_the_commands_make_show_and_end_a_key(commands: Rows, capsys: Capture):
    assert main(["create", "ann", "jobs:read", "--days", "2"]) == 0
    shown = capsys.readouterr().out
    key_id, key, secret = re.findall(r"(key_\w{26})|(slim_\S+)|(whsec_\S+)", shown)
    assert found(commands, key[1]) is not None
    assert len(secret[2]) > 40

    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert key_id[0] in listed
    assert "ann  jobs:read  valid until" in listed
    assert key[1] not in listed

    assert main(["revoke", key_id[0]]) == 0
    assert found(commands, key[1]) is None
    assert main(["revoke", key_id[0]]) == 2
    assert "no key" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert "revoked" in capsys.readouterr().out


def test_an_entry_is_one_that_the_settings_take(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    assert main(["entry", "ann", "jobs:read"]) == 0
    key, entry = re.findall(r"slim_\S+|ann:\S+", capsys.readouterr().out)
    monkeypatch.setenv("SLIMTRIM_API_KEYS", f"{entry}, {new_key('bob')[1]}")

    ann, bob = load_settings().api_keys

    assert (ann.matches(key), ann.scopes, bob.name) == (True, frozenset({"jobs:read"}), "bob")


@pytest.mark.parametrize("arguments", [["create", "ann", "jobs:fly"], ["create", "a n"], ["create", "ann", "--days", "0"]])
def test_a_key_that_cannot_be_is_refused(commands: Rows, arguments: list[str], capsys: Capture):
    assert main(arguments) == 2
    assert capsys.readouterr().err
    assert commands.do(lambda work: work.keys.list()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_a_valid_key(rows: Rows, host: str):
    settings = rows.settings.model_copy(update={"host": host})
    _, entry = new_key("ann")

    with pytest.raises(SettingsRefused, match=r"SLIMTRIM_API_KEYS.*127\.0\.0\.1"):
        require_keys(settings, rows.engine)
    require_keys(settings.model_copy(update={"api_keys": (ApiKey.parse(entry),)}), rows.engine)
    _, row = rows.do(lambda work: work.keys.create("ann", SCOPES))
    require_keys(settings, rows.engine)
    rows.do(lambda work: work.keys.revoke(row.id))
    with pytest.raises(SettingsRefused):
        require_keys(settings, rows.engine)


def test_a_database_that_cannot_be_asked_for_keys_is_no_key(tmp_path: Path):
    from jobs.database import make_engine

    settings = Settings(data_dir=tmp_path / "empty", host="0.0.0.0")
    engine = make_engine(settings)

    with pytest.raises(SettingsRefused, match="SLIMTRIM_API_KEYS"):
        require_keys(settings, engine)
    require_keys(settings.model_copy(update={"host": "127.0.0.1"}), engine)
    engine.dispose()
