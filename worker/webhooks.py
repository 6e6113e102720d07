"""Sends what is due to whoever asked to be told, from threads of its own: a receiver that hangs delays no upkeep.

Few deliveries go to one receiver at a time, so one that hangs leaves room for the others. What is being sent when the
process dies is due again a minute later.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.exc import SQLAlchemyError

from jobs.database import OpenSession, unit_of_work
from jobs.settings import Settings
from jobs.webhooks import Outgoing, secret_of
from worker.delivery import Sender

_AT_ONCE = 16
_AT_ONCE_EACH = 2
_LOOK_EVERY_S = 0.5
_FORGET_EVERY = 7200
"""Looks between two removals of old rows: an hour."""

_log = logging.getLogger("webhooks")


class Dispatcher:
    """Looks for due deliveries and sends them, until it is told to stop."""

    def __init__(self, settings: Settings, open_session: OpenSession, sender: Sender | None = None) -> None:
        self._settings = settings
        self._open_session = open_session
        self._sender = sender or Sender(settings.webhook_hosts)
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="webhook")

    def run(self, stop: threading.Event) -> None:
        """Send until told to stop; what is under way then is finished."""
        looks = 0
        while not stop.is_set():
            try:
                if looks % _FORGET_EVERY == 0:
                    with unit_of_work(self._open_session, _nobody) as work:
                        work.webhooks.forget()
                looks += 1
                found = self.look()
            except SQLAlchemyError:  # the next look may find the database well again
                _log.exception("due deliveries cannot be read")
                found = 0
            if not found:
                stop.wait(_LOOK_EVERY_S)
        self.close()

    def look(self) -> int:
        """Begin to send what is due, as far as there is room; return how many that were."""
        with self._lock:
            room = _AT_ONCE - self._under_way.total()
            busy = [receiver for receiver, count in self._under_way.items() if count >= _AT_ONCE_EACH]
        if room <= 0:
            return 0
        with unit_of_work(self._open_session, _nobody) as work:
            due = work.webhooks.take_due(room, busy, each=_AT_ONCE_EACH)
        with self._lock:
            self._under_way.update(outgoing.receiver for outgoing in due)
        for outgoing in due:
            self._pool.submit(self._deliver, outgoing)
        return len(due)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True)

    def _deliver(self, outgoing: Outgoing) -> None:
        fields = {"delivery": outgoing.id, "receiver": outgoing.receiver, "tries": outgoing.tries}
        try:
            answer = self._sender.send(outgoing, secret_of(self._settings, outgoing.owner))
            with unit_of_work(self._open_session, _nobody) as work:
                state = work.webhooks.settle(outgoing, answer)
            level = logging.WARNING if state == "failed" else logging.INFO
            _log.log(level, f"delivery {state}", extra={**fields, "status": answer.status, "error": answer.error})
        except Exception:  # a thread of a pool tells nobody; the delivery is due again in a minute
            _log.exception("delivery was not settled", extra=fields)
        finally:
            with self._lock:
                self._under_way[outgoing.receiver] -= 1
                if self._under_way[outgoing.receiver] <= 0:
                    del self._under_way[outgoing.receiver]


def start_dispatcher(settings: Settings, open_session: OpenSession, stop: threading.Event) -> threading.Thread:
    """Send deliveries in a thread of its own until told to stop."""
    thread = threading.Thread(target=Dispatcher(settings, open_session).run, args=(stop,), name="webhooks", daemon=True)
    thread.start()
    return thread


def _nobody(_job_id: str, _memory_class: str) -> None:
    """Deliveries announce no job."""
