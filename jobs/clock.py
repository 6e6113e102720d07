"""The database's clock, and times as the rows keep them.

Leases and deadlines are set and compared by the database alone, so that a worker whose clock is wrong can neither
keep a job too long nor lose it too early. Stored and returned times are UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, DateTime, Dialect, Float, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class UtcTime(TypeDecorator[datetime]):
    """A point in time; aware and UTC in Python on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store as UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """Return as UTC; SQLite hands back times without a zone."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class DatabaseNow(FunctionElement[datetime]):
    """Now, plus some seconds, by the database's clock."""

    type = UtcTime()
    inherit_cache = True


def now(offset_s: float | ColumnElement[Any] = 0.0) -> ColumnElement[datetime]:
    """Return the SQL for the present time plus ``offset_s`` seconds, a number or a column."""
    offset = literal(float(offset_s), Float) if isinstance(offset_s, int | float) else offset_s
    return DatabaseNow(offset)


def moment(time: datetime | None) -> str | None:
    """Return RFC 3339 in UTC, to the millisecond."""
    return None if time is None else time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@compiles(DatabaseNow, "sqlite")
def _sqlite_now(element: DatabaseNow, compiler: SQLCompiler, **options: Any) -> str:
    # The text form is the one in which SQLAlchemy stores times in SQLite, so plain comparison orders them.
    offset = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {offset} || ' seconds')"


@compiles(DatabaseNow, "postgresql")
def _postgresql_now(element: DatabaseNow, compiler: SQLCompiler, **options: Any) -> str:
    # Not now(), which stands still for the length of a transaction; not clock_timestamp(), with which no index can be
    # searched. Where a statement had to wait for a lock its time is too early: a lease ends sooner, and is ended later.
    offset = compiler.process(element.clauses, **options)
    return f"(statement_timestamp() + make_interval(secs => {offset}))"
