"""What the routes work with: settings, database, queue, store, and the little state that lives as long as the process."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Engine

from api.callers import Callers
from api.dashboard.sessions import Sessions
from api.errors import Problem
from api.metrics import Metrics
from api.readiness import Readiness
from api.signing import LinkSigner
from api.streams import Streams
from jobs.database import Announce, OpenSession, make_engine, reader_maker, session_maker
from jobs.queue import Announcer
from jobs.repository import Idempotency
from jobs.settings import Settings
from jobs.storage import Storage, open_storage


class InFlight:
    """The idempotency keys whose first request is being worked on by this process.

    The database alone decides which request makes the job; this only spares the second one the reading of a model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: set[tuple[str, str]] = set()

    @contextmanager
    def hold(self, idempotency: Idempotency | None) -> Generator[None]:
        """Hold a key while its request is worked on, or refuse because another request holds it."""
        if idempotency is None:
            yield
            return
        key = (idempotency.owner, idempotency.key_hash)
        with self._lock:
            if key in self._held:
                raise Problem("idempotency_in_flight", "a request with this Idempotency-Key is being worked on; try again soon")
            self._held.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(key)


@dataclass(frozen=True)
class Service:
    """Everything that outlives a request."""

    settings: Settings
    engine: Engine
    open_session: OpenSession
    open_reader: OpenSession
    storage: Storage
    signer: LinkSigner
    announcer: Announcer
    announce: Announce
    callers: Callers
    sessions: Sessions
    streams: Streams
    metrics: Metrics
    draining: threading.Event
    """Set when the process is about to end: nothing new is accepted, and whoever waits is answered."""
    in_flight: InFlight = field(default_factory=InFlight)
    readiness: Readiness = field(default_factory=Readiness)

    def close(self) -> None:
        """Give connections back."""
        self.draining.set()
        self.announcer.close()
        self.engine.dispose()


def open_service(settings: Settings, announce: Announce | None = None) -> Service:
    """Open everything that the settings name; ``announce`` replaces the queue in tests."""
    engine = make_engine(settings)
    announcer = Announcer(settings)
    open_reader, draining = reader_maker(engine), threading.Event()
    return Service(
        settings=settings,
        engine=engine,
        open_session=session_maker(engine),
        open_reader=open_reader,
        storage=open_storage(settings),
        signer=LinkSigner.of(settings),
        announcer=announcer,
        announce=announce or announcer.announce,
        callers=Callers(settings, open_reader),
        sessions=Sessions.of(settings),
        streams=Streams(open_reader, settings.stream_limit, draining),
        draining=draining,
        metrics=Metrics(settings, open_reader),
    )
