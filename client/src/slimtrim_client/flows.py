"""What every verb does, written once: a generator yields what is to be done next and is told how it went.

``Client`` does it at once, ``AsyncClient`` does it on an event loop; neither decides anything. So retries, long polling and
coming back to a cut stream are the same in both, and are tested without a socket.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from slimtrim_client import messages
from slimtrim_client.documents import LAST_EVENTS, Body, Event, Job, is_over
from slimtrim_client.errors import TookTooLong, UnexpectedAnswer, Unreachable
from slimtrim_client.messages import EVENT_STREAM, Answer, Failed, Request, document_of, refusal_of
from slimtrim_client.retries import Patience, Tries, may_be_retried, retry_after
from slimtrim_client.sse import Decoder, Message

T = TypeVar("T")

LONG_POLL_S = 20
"""Seconds that a poll may be held by the service; some proxies cut at 30."""
_FRUITLESS = 3
"""Streams in a row that bring nothing, after which a watcher polls instead."""
_LONGEST_REST_S = 10.0


@dataclass(frozen=True)
class Send:
    """Send the request and read the whole answer."""

    request: Request


@dataclass(frozen=True)
class Sleep:
    """Let some seconds pass."""

    seconds: float


@dataclass(frozen=True)
class Open:
    """Send the request; leave the body of a good answer unread, and the stream open."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Return some bytes of the open stream; nothing at its end."""


@dataclass(frozen=True)
class Close:
    """Close the stream."""


@dataclass(frozen=True)
class Emit:
    """Hand something to whoever iterates."""

    value: Any


Command = Send | Sleep | Open | Read | Close | Emit
Reply = Answer | Failed | bytes | None
Flow = Generator[Command, Reply, T]


def call(request: Request, patience: Patience, good: frozenset[int] = frozenset()) -> Flow[Answer]:
    """Return the answer, after as many tries as it takes; raise what it says if it is not a success.

    ``good``: statuses that are no success but taken as answers.
    """
    tries = Tries(patience)
    while True:
        reply = yield Send(request)
        assert isinstance(reply, Answer | Failed)
        wait = tries.next_wait(reply)
        if wait is None:
            break
        yield Sleep(wait)
    if isinstance(reply, Failed):
        times = f"{patience.tries} times" if patience.tries > 1 else "once"
        raise Unreachable(f"{request}: no answer, tried {times}; last: {reply.reason}")
    if not (200 <= reply.status < 300 or reply.status in good):
        raise refusal_of(str(request), reply)
    return reply


def document(request: Request, patience: Patience) -> Flow[Any]:
    """Return the document that a call is answered with."""
    return document_of(request, (yield from call(request, patience)))


def submit(body: Body, key: str | None, patience: Patience) -> Flow[Any]:
    """Create a job, one for all tries."""
    return (yield from document(messages.post_job(body, key or new_key()), patience))


def retry(job_id: str, key: str | None, patience: Patience) -> Flow[Any]:
    """Create a job that goes on where another ended, one for all tries."""
    return (yield from document(messages.retry_job(job_id, key or new_key()), patience))


def delete(job_id: str, patience: Patience) -> Flow[None]:
    """Remove a job. One that is gone after a first try whose answer was lost was removed by that."""
    reply = yield Send(messages.delete_job(job_id))
    assert isinstance(reply, Answer | Failed)
    if isinstance(reply, Answer) and not may_be_retried(reply):
        if not 200 <= reply.status < 300:
            raise refusal_of(f"DELETE job {job_id}", reply)
        return
    yield Sleep(patience.pause(1))
    yield from call(messages.delete_job(job_id), patience, good=frozenset({messages.NOT_FOUND}))


def page(job_id: str, media_type: str, patience: Patience) -> Flow[str]:
    """Return a report as text of some type."""
    answer = yield from call(messages.get_report(job_id, media_type), patience)
    return answer.body.decode("utf-8", "replace")


def follow(job_id: str, patience: Patience, timeout_s: float | None = None) -> Flow[None]:
    """Emit the job now, and each time it has changed, until it is over."""
    patience, end = patience.while_a_job_runs(), None if timeout_s is None else time.monotonic() + timeout_s
    look = _Look()
    while True:
        left = LONG_POLL_S if end is None else end - time.monotonic()
        if look.count and left <= 0:
            raise TookTooLong(f"job {job_id} was not over after {timeout_s:g} s; it goes on")
        look = yield from _look(job_id, look, patience, max(1, min(LONG_POLL_S, int(left))))
        if look.job is not None:
            yield Emit(look.job)
            if is_over(look.job):
                return


def wait(job_id: str, patience: Patience, timeout_s: float | None = None) -> Flow[Job]:
    """Return the job once it is over."""
    flow, reply, job = follow(job_id, patience, timeout_s), None, None
    while True:
        try:
            command = flow.send(reply)
        except StopIteration:
            break
        if isinstance(command, Emit):
            job, reply = command.value, None
        else:
            reply = yield command
    assert job is not None, "the first answer is always emitted"
    return job


def watch(job_id: str, after: int, patience: Patience) -> Flow[None]:
    """Emit every event after a number, as it happens, until the job's last.

    A stream that is cut is opened again after the last event that came. Where streams bring nothing, by a proxy that holds them
    back or a service that serves no more of them, pages of events are read instead.
    """
    seen, fruitless, patience = after, 0, patience.while_a_job_runs()
    while fruitless < _FRUITLESS:
        reply = yield Open(messages.stream_events(job_id, seen))
        assert isinstance(reply, Answer | Failed)
        if isinstance(reply, Answer) and reply.status == 204:
            return
        if isinstance(reply, Failed) or reply.status != 200 or reply.media_type != EVENT_STREAM:
            yield Close()
            if isinstance(reply, Answer) and _is_final(reply):
                raise refusal_of(f"the events of {job_id}", reply)
            if isinstance(reply, Answer) and not may_be_retried(reply):
                break
            fruitless += 1
            yield Sleep(patience.pause(fruitless))
            continue
        ended = yield from _read_stream(seen)
        yield Close()
        if ended.is_last:
            return
        fruitless = 0 if ended.is_fruitful else fruitless + 1
        seen = ended.seen
        yield Sleep((ended.retry_s or 1.0) * (0.5 + 0.5 * patience.lot()))
    yield from _poll(job_id, seen, patience)


@dataclass(frozen=True)
class _Ended:
    """How a stream ended."""

    seen: int
    is_last: bool
    is_fruitful: bool
    retry_s: float | None


def _read_stream(seen: int) -> Flow[_Ended]:
    """Emit the events of an open stream."""
    decoder, first = Decoder(), seen
    while True:
        chunk = yield Read()
        if not chunk or not isinstance(chunk, bytes):
            return _Ended(seen, False, seen > first or decoder.heartbeats > 0, decoder.retry_s)
        for message in decoder.feed(chunk):
            if message.event == "end":
                return _Ended(seen, True, True, decoder.retry_s)
            event = _event_of(message)
            if event["seq"] > seen:
                seen = event["seq"]
                yield Emit(event)
                if event["type"] in LAST_EVENTS:
                    return _Ended(seen, True, True, decoder.retry_s)


def _poll(job_id: str, seen: int, patience: Patience) -> Flow[None]:
    """Emit events by pages; between them the job is asked whether it has changed."""
    look, is_known_over = _Look(), False
    while True:
        events = yield from document(messages.get_events(job_id, seen), patience)
        for event in events["data"]:
            seen = event["seq"]
            yield Emit(event)
            if event["type"] in LAST_EVENTS:
                return
        if events["has_more"]:
            continue
        if is_known_over:  # since before that page was read, so nothing will come
            return
        look = yield from _look(job_id, look, patience, LONG_POLL_S)
        is_known_over = look.job is not None and is_over(look.job)


@dataclass(frozen=True)
class _Look:
    """What a look at a job brought, and what the next one compares with."""

    job: Job | None = None
    """None: as it was."""
    tag: str | None = None
    count: int = 0


def _look(job_id: str, before: _Look, patience: Patience, wait_s: int) -> Flow[_Look]:
    """Look at a job; but for the first time, when it has changed or some seconds are over."""
    request = messages.get_job(job_id, tag=before.tag, wait_s=wait_s if before.tag else 0)
    answer = yield from call(request, patience, good=frozenset({304}))
    job = None if answer.status == 304 else cast(Job, document_of(request, answer))
    if before.count and "preference-applied" not in answer.headers and (job is None or not is_over(job)):
        yield Sleep(min(retry_after(answer) or 2.0, wait_s, _LONGEST_REST_S))
    return _Look(job, answer.headers.get("etag"), before.count + 1)


def new_key() -> str:
    """Return an Idempotency-Key that nobody had before."""
    return uuid.uuid4().hex


def _is_final(answer: Answer) -> bool:
    """Say whether an answer speaks of the job or the caller, not of streams."""
    return answer.status in (400, 401, 403, 404)


def _event_of(message: Message) -> Event:
    try:
        event = json.loads(message.data)
    except ValueError as error:
        raise UnexpectedAnswer(f"an event of the stream is not JSON: {message.data[:200]!r}") from error
    if not isinstance(event, dict) or not isinstance(event.get("seq"), int) or not isinstance(event.get("type"), str):  # pyright: ignore[reportUnknownMemberType]
        raise UnexpectedAnswer(f"an event of the stream has no seq or type: {message.data[:200]!r}")
    return cast(Event, event)
