"""``python -m jobs.keys``: make, list and revoke keys in the database, or make an entry for the settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from compression.errors import SlimtrimError
from jobs.clock import moment
from jobs.database import UnitOfWork, make_engine, require_current_schema, session_maker, unit_of_work
from jobs.keys import SCOPES, new_key
from jobs.settings import Settings, load_settings
from jobs.tables import ApiKeyRow
from jobs.webhooks import secret_of


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks; 2 when it cannot be done."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "entry":
            return _entry(asked.name, asked.scopes or SCOPES)
        settings = load_settings()
        engine = make_engine(settings)
        require_current_schema(engine)
        with unit_of_work(session_maker(engine), lambda _id, _class: None) as work:
            said, code = _act(work, settings, asked)
    except (SlimtrimError, ValueError) as refusal:
        sys.stderr.write(f"{refusal}\n")
        return 2
    except SQLAlchemyError as error:
        sys.stderr.write(f"the database does not do it: {type(error).__name__}\n")
        return 2
    # After the commit: a key that is shown is one that works.
    (sys.stdout if code == 0 else sys.stderr).write(said)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.keys", description=f"Scopes: {' '.join(SCOPES)}; all of them by default."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key in the database; it works at once")
    create.add_argument("--days", type=float, help="after which it ends")
    entry = commands.add_parser("entry", help="make a key and its entry for SLIMTRIM_API_KEYS; needs no database")
    for command in (create, entry):
        command.add_argument("name", help="of the caller, who owns its jobs; two keys may have the same")
        command.add_argument("scopes", nargs="*", metavar="SCOPE")
    commands.add_parser("list", help="show the keys of the database, not those of the settings")
    revoke = commands.add_parser("revoke", help="end a key of the database, within seconds")
    revoke.add_argument("id")
    return parser


def _entry(name: str, scopes: Sequence[str]) -> int:
    key, entry = new_key(name, scopes)
    sys.stdout.write(f"key (shown once):    {key}\nSLIMTRIM_API_KEYS = {entry}\n")
    return 0


def _act(work: UnitOfWork, settings: Settings, asked: argparse.Namespace) -> tuple[str, int]:
    match asked.command:
        case "create":
            if asked.days is not None and asked.days <= 0:
                raise ValueError("--days must be above 0")
            key, row = work.keys.create(asked.name, asked.scopes or SCOPES, asked.days)
            shown = f"id:                  {row.id}\nkey (shown once):    {key}\n"
            return f"{shown}webhook secret:      {secret_of(settings, row.owner)}\n", 0
        case "list":
            return "".join(_line(row) for row in work.keys.list()), 0
        case _:
            if work.keys.revoke(asked.id):
                return f"{asked.id} is revoked\n", 0
            return f"there is no key {asked.id[:64]!r} that is not revoked yet; python -m jobs.keys list shows them\n", 2


def _line(row: ApiKeyRow) -> str:
    if row.revoked_at is not None:
        state = f"revoked {moment(row.revoked_at)}"
    elif row.expires_at is None:
        state = "valid"
    else:
        state = f"{'valid until' if row.expires_at > datetime.now(UTC) else 'expired'} {moment(row.expires_at)}"
    return f"{row.id}  {row.hint}...  {row.owner}  {'+'.join(row.scopes['scopes'])}  {state}\n"
