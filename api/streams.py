"""Live streams of events: server-sent events, fed from the table by one poller per process.

Once a second the poller asks which of the watched jobs have news, reads that, and hands it to every stream of those
jobs. Since everything comes from the table, any process serves any stream, and a stream goes on at another process
after the event whose id the client saw last. A stream holds a bounded number of events; one that is behind, because it
began late or its client reads slowly, reads pages of the table at its own pace. A client that takes nothing for some
seconds is let go of, and may come back by id.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
from anyio import CapacityLimiter, to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import Problem
from api.views import event_view
from jobs.database import OpenSession, reading
from jobs.status import TERMINAL
from jobs.tables import JobEvent

EVENT_STREAM = "text/event-stream"
POLL_S = 1.0
HEARTBEAT_S = 15.0
WRITE_TIMEOUT_S = 10.0
"""Seconds for which a client may take nothing."""
RETRY_MS = 3000
_HELD = 256
"""Events that a stream holds for its client."""
_PAGE = 256
_END = b"event: end\ndata: {}\n\n"
_LAST = frozenset(f"job.{status}" for status in TERMINAL)
"""Types after which a job has no further event."""

log = logging.getLogger("slimtrim.api")

Sent = tuple[int, str, bytes]
"""An event's number, its type, and its bytes on the wire."""


class Stream:
    """One client's place in the events of one job."""

    def __init__(self, job_id: str, seq: int) -> None:
        self.job_id = job_id
        self.seq = seq
        """Of the last event that was sent."""
        self.is_closing = False
        self._known = seq
        """Of the last event that there is, as far as the poller said."""
        self._held: list[Sent] = []
        self._news = anyio.Event()

    @property
    def is_behind(self) -> bool:
        """Whether there are events that this stream does not hold."""
        next_held = self._held[0][0] if self._held else self._known + 1
        return self.seq + 1 < next_held

    def offer(self, known: int, events: Iterable[Sent]) -> None:
        """Take events while there is room; what does not fit is read from the table later."""
        self._known = max(self._known, known)
        for event in events:
            follows = self._held[-1][0] if self._held else self.seq
            if event[0] == follows + 1 and len(self._held) < _HELD:
                self._held.append(event)
        if self._held or self.is_behind:
            self._news.set()

    def close(self) -> None:
        """Let the stream end soon."""
        self.is_closing = True
        self._news.set()

    def take(self) -> list[Sent]:
        """Return what is held and comes next, and hold it no more."""
        taken, self._held = [event for event in self._held if event[0] > self.seq], []
        return taken

    async def wait(self, seconds: float) -> None:
        """Return when there is news, or after some seconds."""
        with anyio.move_on_after(seconds):
            await self._news.wait()
        self._news = anyio.Event()


class Streams:
    """All streams of this process, and the poller that feeds them."""

    def __init__(self, open_reader: OpenSession, limit: int, draining: threading.Event) -> None:
        self.write_timeout_s = WRITE_TIMEOUT_S
        self.heartbeat_s = HEARTBEAT_S
        self.poll_s = POLL_S
        self._open_reader = open_reader
        self._limit = limit
        self._draining = draining
        self._streams: dict[str, set[Stream]] = defaultdict(set)
        self._count = 0
        self._readers: CapacityLimiter | None = None

    @property
    def count(self) -> int:
        """How many streams are open."""
        return self._count

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Poll for as long as the context is open."""
        # Streams that come back all at once must not take every thread that other requests need.
        self._readers = CapacityLimiter(4)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._poll_forever)
            yield
            tasks.cancel_scope.cancel()

    def open(self, job_id: str, seq: int) -> Response:
        """Return the answer that is the stream of a job's events after a number."""
        self.check_room()
        return EventStreamResponse(self, Stream(job_id, seq))

    def check_room(self) -> None:
        """Refuse one more stream where there are too many, or the service stops."""
        if self._draining.is_set():
            raise Problem("draining", "the service is stopping; open the stream again in a moment")
        if self._count >= self._limit:
            raise Problem(
                "unavailable", f"{self._limit} streams are open, and no more are served; poll the job, or try again later"
            )

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count a stream of another kind for as long as the context is open."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @property
    def is_ending(self) -> bool:
        """Whether the service stops, and every stream should end."""
        return self._draining.is_set()

    @asynccontextmanager
    async def watched(self, stream: Stream) -> AsyncGenerator[None]:
        """Count the stream, and feed it, for as long as the context is open."""
        self._streams[stream.job_id].add(stream)
        try:
            with self.counted():
                yield
        finally:
            self._streams[stream.job_id].discard(stream)
            if not self._streams[stream.job_id]:
                del self._streams[stream.job_id]

    async def page(self, stream: Stream) -> list[Sent]:
        """Read events that a stream is behind by, some at a time."""
        return await to_thread.run_sync(self._read_page, stream.job_id, stream.seq, limiter=self._readers)

    async def _poll_forever(self) -> None:
        while True:
            await anyio.sleep(self.poll_s)
            if self._draining.is_set():
                for stream in self._all():
                    stream.close()
            elif self._streams:
                try:
                    await self._poll()
                except SQLAlchemyError:  # the next round may find the database well again
                    log.exception("streams cannot be fed")

    async def _poll(self) -> None:
        known = {job_id: max(stream.seq for stream in streams) for job_id, streams in self._streams.items()}
        last, events = await to_thread.run_sync(self._read_news, known)
        for stream in self._all():
            if stream.job_id not in last:
                stream.close()  # the job was deleted
            else:
                stream.offer(last[stream.job_id], events.get(stream.job_id, ()))

    def _all(self) -> list[Stream]:
        return [stream for streams in self._streams.values() for stream in streams]

    def _read_news(self, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[Sent]]]:
        with reading(self._open_reader) as work:
            last = work.events.last_of(list(known))
            news = {job_id: seq for job_id, seq in known.items() if last.get(job_id, 0) > seq}
            events: dict[str, list[Sent]] = defaultdict(list)
            for event in work.events.after(news, limit_each=_HELD):
                events[event.job_id].append(sent(event))
            return last, events

    def _read_page(self, job_id: str, seq: int) -> list[Sent]:
        with reading(self._open_reader) as work:
            return [sent(event) for event in work.events.after({job_id: seq}, limit_each=_PAGE)]


class EventStreamResponse(Response):
    """Sends a stream until the job is over, the client leaves or does not read, or the service stops."""

    media_type = EVENT_STREAM

    def __init__(self, streams: Streams, stream: Stream) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no", "Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._streams = streams
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        self._send = send
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope.get("state", {}).get("head", False):
            await send({"type": "http.response.body", "body": b""})
            return
        async with self._streams.watched(self._stream), anyio.create_task_group() as tasks:
            tasks.start_soon(self._notice_leaving, receive, tasks.cancel_scope)
            await self._pump()
            tasks.cancel_scope.cancel()

    async def _notice_leaving(self, receive: Receive, everything: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        everything.cancel()

    async def _pump(self) -> None:
        stream, is_taken = self._stream, await self._write(f"retry: {RETRY_MS}\n\n".encode())
        # What happened before the stream began is not waited for.
        events = await self._page()
        while is_taken and not stream.is_closing:
            is_taken = await self._pass_on(events)
            if events and events[-1][1] in _LAST:
                await self._finish(_END)
                return
            if stream.is_behind:
                events = await self._page()
                continue
            await stream.wait(self._streams.heartbeat_s)
            events = await self._page() if stream.is_behind else stream.take()
            if not events and not stream.is_closing:
                is_taken = await self._write(b": \n\n")
        if is_taken:
            await self._finish(b"")

    async def _pass_on(self, events: Sequence[Sent]) -> bool:
        for seq, _, text in events:
            if not await self._write(text):
                return False
            self._stream.seq = seq
        return True

    async def _page(self) -> list[Sent]:
        try:
            return await self._streams.page(self._stream)
        except SQLAlchemyError:  # the client comes back by id
            log.exception("a stream cannot be continued")
            self._stream.close()
            return []

    async def _write(self, text: bytes) -> bool:
        """Send, and say whether the client took what came before in time; the server holds a little of its own."""
        with anyio.move_on_after(self._streams.write_timeout_s):
            await self._send({"type": "http.response.body", "body": text, "more_body": True})
            return True
        log.info("stream let go of: the client does not read", extra={"job": self._stream.job_id, "seq": self._stream.seq})
        return False

    async def _finish(self, text: bytes) -> None:
        with anyio.move_on_after(self._streams.write_timeout_s):
            await self._send({"type": "http.response.body", "body": text, "more_body": False})


def sent(event: JobEvent) -> Sent:
    """Return an event as it goes over the wire, encoded once for all its streams."""
    data = json.dumps(event_view(event).model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
    return event.seq, event.type, f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()
