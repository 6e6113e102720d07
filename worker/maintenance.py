"""The service's own upkeep, once a second: end what nobody ends, announce what nobody heard, remove what nobody owns.

``python -m worker.maintenance``. Any number may be started; one of them acts (``jobs/turn.py``), the others take over.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from compression.errors import SlimtrimError
from jobs.alive import alive_file, touch
from jobs.blocks import ROOT
from jobs.database import make_engine, reader_maker, reading, require_current_schema, session_maker, unit_of_work
from jobs.logs import configure_logs
from jobs.one_machine import refuse_divided_parts
from jobs.queue import Announcer
from jobs.settings import Settings, load_settings
from jobs.storage import open_storage
from jobs.turn import Turn
from worker.webhooks import start_dispatcher
from worker.workspace import remove

HEARD_AT_MOST = 16
"""Announcements of a class that may wait unheard before repeating one is pointless: the workers are busy, not deaf."""
_CLEAN_EVERY_S = 60.0
_UPLOAD_S = 86_400.0
"""Unfinished uploads and files in the store are removed when they are older: no attempt takes a day to store its artifact."""
_ATTEMPT = re.compile(r"(?:artifacts/|(?P<part>blocks/[^/]+/[^/]+/))?(?P<job>job_[0-9a-z]+)/a(?P<fence>\d+)")
_PART = re.compile(rf"(?P<attempt>{ROOT}/[^/]+/[^/]+/job_[0-9a-z]+/a\d+)/(?P<name>[^/]+)/")

_log = logging.getLogger("maintenance")


class Maintenance:
    """The loop's work, one round at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.engine = make_engine(settings)
        require_current_schema(self.engine)
        self.open_session, self._open_reader = session_maker(self.engine), reader_maker(self.engine)
        self._announcer = Announcer(settings)
        self._storage = open_storage(settings)

    def round(self) -> None:
        """End what is overdue and announce what is due."""
        # A worker fails its own job at the deadline; half a minute and a lease later it evidently cannot.
        grace_s = self._settings.lease_s + 30.0
        with unit_of_work(self.open_session, self._announcer.announce) as work:
            requeued = work.upkeep.expire_leases()
            work.outbox.extend(requeued)
            overdue = work.upkeep.expire_runtimes(grace_s)
            expired = work.upkeep.expire_queued()
            about = work.upkeep.log_fields([*requeued, *overdue, *expired])
        _note("lease over, queued again", [about[job_id] for job_id in requeued])
        _note("over its runtime, failed", [about[job_id] for job_id in overdue])
        _note("waited too long, expired", [about[job_id] for job_id in expired])
        self._announce_again()

    def clean(self) -> None:
        """Remove scratch folders and artifacts that no attempt uses and no job shows, and forget old keys."""
        with unit_of_work(self.open_session, self._announcer.announce) as work:
            work.upkeep.forget_keys()
            stale = work.blocks.forget_stale(self._settings.blocks_kept_s)
            work.workers.forget_silent()
        for prefix in stale:
            _note("finished blocks removed", [{"prefix": prefix}])
            self._storage.delete(prefix)
        self._storage.sweep_uploads(_UPLOAD_S)
        for folder in self._settings.work_folder.glob("job_*/a*"):
            if not self._is_held(folder.relative_to(self._settings.work_folder).as_posix()):
                _note("scratch folder removed", [_named(folder.relative_to(self._settings.work_folder).as_posix())])
                remove(folder)
        for prefix in self._stored_attempts():
            if not self._is_held(prefix) and not self._is_published(prefix):
                _note("artifact of no job removed", [_named(prefix)])
                self._storage.delete(prefix)
        for prefix, names in self._stored_parts().items():
            if not self._is_held(prefix):
                self._remove_parts(prefix, names - self._kept_names(prefix))

    def _announce_again(self) -> None:
        waiting = self._announcer.pending()
        short = (
            {} if waiting is None else {name: HEARD_AT_MOST - count for name, count in waiting.items() if count < HEARD_AT_MOST}
        )
        if not short:
            return
        with unit_of_work(self.open_session, self._announcer.announce) as work:
            for name, room in short.items():
                work.outbox.extend(work.upkeep.next_claimable(name, self._settings.announce_after_s, room))

    def _stored_attempts(self) -> list[str]:
        matches = (_ATTEMPT.match(key) for key in self._storage.list("artifacts"))
        return sorted({match[0] for match in matches if match})

    def _stored_parts(self) -> dict[str, set[str]]:
        """Return what each attempt has stored of finished parts, by name; a transfer may have ended without its row."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for key in self._storage.list(ROOT):
            if match := _PART.match(key):
                found[match["attempt"]].add(match["name"])
        return found

    def _remove_parts(self, prefix: str, names: set[str]) -> None:
        for name in sorted(names):
            _note("part of no run removed", [{**_named(prefix), "part": name}])
            self._storage.delete(f"{prefix}/{name}")

    def _is_held(self, path: str) -> bool:
        match = _ATTEMPT.match(path)
        if match is None:
            return True  # not ours to judge
        with reading(self._open_reader) as work:
            return work.upkeep.is_held(match["job"], int(match["fence"]))

    def _kept_names(self, prefix: str) -> set[str]:
        match = _ATTEMPT.match(prefix)
        assert match is not None
        with reading(self._open_reader) as work:
            return work.blocks.kept_of(match["job"], int(match["fence"]), match["part"])

    def _is_published(self, prefix: str) -> bool:
        job_id = prefix.split("/")[1]
        with reading(self._open_reader) as work:
            return work.upkeep.is_published(job_id, f"{prefix}/")


def _named(path: str) -> dict[str, Any]:
    match = _ATTEMPT.match(path)
    return {} if match is None else {"job": match["job"], "fence": int(match["fence"])}


def main() -> int:
    """Keep house until SIGTERM."""
    try:
        settings = load_settings()
        refuse_divided_parts(settings)
        maintenance = Maintenance(settings)
    except SlimtrimError as refusal:
        sys.stderr.write(f"maintenance does not start: {refusal}\n")
        return 2
    configure_logs(service="maintenance")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    start_dispatcher(settings, maintenance.open_session, stop)
    alive = alive_file(settings, "maintenance")
    with Turn(maintenance.engine, settings.data_dir / "maintenance.lock") as turn:
        _loop(maintenance, turn, settings.maintenance_s, stop, alive)
    return 0


def _loop(maintenance: Maintenance, turn: Turn, every_s: float, stop: threading.Event, alive: Path) -> None:
    clean_at = 0.0
    while not stop.is_set():
        touch(alive)
        try:
            if not turn.is_ours():
                stop.wait(every_s)
                continue
            maintenance.round()
            if time.monotonic() >= clean_at:
                maintenance.clean()
                clean_at = time.monotonic() + _CLEAN_EVERY_S
        except (SQLAlchemyError, SlimtrimError, OSError):  # the next round may find database and disk well again
            _log.exception("round failed")
        stop.wait(every_s)


def _note(event: str, jobs: Iterable[Mapping[str, Any]]) -> None:
    for fields in jobs:
        _log.info(event, extra=dict(fields))


if __name__ == "__main__":
    raise SystemExit(main())
