"""What every verb does, seen without a socket: when it tries again, with which key, and how it comes back to a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from slimtrim_client import flows
from slimtrim_client.errors import Refused, TookTooLong, Unavailable, Unreachable
from slimtrim_client.flows import Close, Emit, Flow, Open, Read, Send, Sleep
from slimtrim_client.messages import Answer, Failed, Request
from slimtrim_client.retries import Patience, retry_after
from tests.client import scripted
from tests.client.scripted import Reply, event, job

PATIENCE = Patience(tries=4, lot=lambda: 1.0)


@dataclass
class Play:
    """Drives a flow with what a service would say; keeps what it did."""

    replies: Sequence[Reply | Failed]
    requests: list[Request] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    emitted: list[Any] = field(default_factory=list)
    returned: Any = None

    def run(self, flow: Flow[Any]) -> Play:
        replies, rest, reply = iter(self.replies), b"", None
        while True:
            try:
                command = flow.send(reply)
            except StopIteration as stop:
                self.returned = stop.value
                return self
            reply = None
            match command:
                case Send(request) | Open(request):
                    self.requests.append(request)
                    said = next(replies)
                    reply = said if isinstance(said, Failed) else _answer(said)
                    rest = b"" if isinstance(said, Failed) else said.content
                case Read():
                    reply, rest = rest, b""
                case Sleep(seconds):
                    self.slept.append(seconds)
                case Emit(value):
                    self.emitted.append(value)
                case Close():
                    pass


def _answer(said: Reply) -> Answer:
    return Answer(said.status, {name.lower(): value for name, value in said.headers.items()}, said.content)


CUT = Failed("connection reset")
BUSY = scripted.problem(503, "unavailable", "the database is away", headers={"Retry-After": "7"})
CREATED = Reply(201, job("queued"))


def submit(patience: Patience = PATIENCE) -> Flow[Any]:
    return flows.submit({"model": "m"}, None, patience)


@pytest.mark.parametrize(
    "trouble",
    [CUT, BUSY, Reply(502), Reply(504), scripted.problem(429, "rate_limited", "slow", headers={"Retry-After": "1"}),
     scripted.problem(409, "idempotency_in_flight", "wait", headers={"Retry-After": "1"})],
    ids=["cut", "503", "502", "504", "429", "the first is still worked on"],
)  # fmt: skip
def test_a_job_is_asked_for_again_under_the_same_key(trouble: Reply | Failed):
    play = Play([trouble, trouble, trouble, CREATED]).run(submit())

    keys = {request.headers["Idempotency-Key"] for request in play.requests}
    assert play.returned == job("queued")
    assert len(play.requests) == 4
    assert len(keys) == 1


def test_two_jobs_have_two_keys():
    plays = [Play([CREATED]).run(submit()) for _ in range(2)]

    assert len({play.requests[0].headers["Idempotency-Key"] for play in plays}) == 2


def test_a_pause_that_the_service_asks_for_is_kept_and_others_grow():
    play = Play([BUSY, CUT, CUT, CREATED]).run(submit())

    assert play.slept[0] >= 7
    assert play.slept[1:] == [1.0, 2.0]
    assert [PATIENCE.pause(failures) for failures in (1, 2, 3, 40)] == [0.5, 1.0, 2.0, 20.0]
    assert Patience(lot=lambda: 0.0).pause(40) == 10.0


def test_a_service_that_asks_for_an_hour_is_not_waited_for():
    with pytest.raises(Unavailable, match="try in an hour"):
        Play([scripted.problem(503, "unavailable", "try in an hour", headers={"Retry-After": "3600"})]).run(submit())


def test_a_date_is_a_pause_as_well():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)

    assert 80 < (retry_after(Answer(503, {"retry-after": later})) or 0) <= 90
    assert retry_after(Answer(503, {"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"})) == 0
    assert retry_after(Answer(503, {"retry-after": "soon"})) is None
    assert retry_after(Answer(503, {})) is None


def test_tries_end():
    with pytest.raises(Unreachable, match="tried 4 times; last: connection reset"):
        Play([CUT] * 4).run(submit())
    with pytest.raises(Unavailable, match="the database is away"):
        Play([BUSY] * 4).run(submit())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500])
def test_what_cannot_succeed_is_asked_once(status: int):
    with pytest.raises((Refused, Unavailable), match="no such thing"):
        Play([scripted.problem(status, "some_code", "no such thing")]).run(submit())


def test_every_fault_is_told_once_with_its_place():
    faults = [
        {"pointer": "/target_memory", "code": "x", "detail": "not a size"},
        {"pointer": None, "parameter": "limit", "code": "x", "detail": "at most 100"},
    ]
    with pytest.raises(Refused) as caught:
        Play([scripted.problem(422, "validation_failed", "/target_memory: not a size", errors=faults)]).run(submit())

    told = str(caught.value).splitlines()
    assert told == ["POST /v1/jobs: validation_failed: /target_memory: not a size", "  limit: at most 100"]
    assert caught.value.code == "validation_failed"


def test_a_job_that_is_gone_after_a_lost_answer_was_deleted_by_it():
    gone = scripted.problem(404, "not_found", "there is no job job_x")

    Play([CUT, gone]).run(flows.delete("job_x", PATIENCE))
    with pytest.raises(Refused, match="there is no job"):
        Play([gone]).run(flows.delete("job_x", PATIENCE))


# Following


def test_a_job_is_yielded_each_time_it_has_changed_until_it_is_over():
    waited = {"Preference-Applied": "wait=20"}
    replies = [
        Reply(200, job("queued"), {"ETag": 'W/"1"'}),
        Reply(304, b"", {"ETag": 'W/"1"', **waited}),
        Reply(200, job("running"), {"ETag": 'W/"2"', **waited}),
        Reply(200, job("succeeded"), {"ETag": 'W/"3"', **waited}),
    ]
    play = Play(replies).run(flows.follow("job_x", PATIENCE))

    assert [each["status"] for each in play.emitted] == ["queued", "running", "succeeded"]
    assert [request.headers.get("If-None-Match") for request in play.requests] == [None, 'W/"1"', 'W/"1"', 'W/"2"']
    assert [request.headers.get("Prefer") for request in play.requests] == [None, "wait=20", "wait=20", "wait=20"]
    assert play.slept == []


def test_a_service_that_does_not_hold_a_poll_is_not_asked_without_a_pause():
    active = Reply(200, job(), {"ETag": '"1"', "Retry-After": "5"})
    play = Play([active, active, Reply(200, job(), {}), Reply(200, job("failed"), {})]).run(flows.follow("job_x", PATIENCE))

    assert play.slept == [5.0, 2.0]


def test_waiting_survives_a_restart_and_returns_the_end():
    play = Play([Reply(200, job(), {"ETag": '"1"'}), *[CUT] * 7, Reply(200, job("succeeded"))]).run(flows.wait("job_x", PATIENCE))

    assert play.returned["status"] == "succeeded"


def test_a_timeout_ends_the_waiting_and_not_the_job():
    with pytest.raises(TookTooLong, match="it goes on"):
        Play([Reply(200, job(), {"ETag": '"1"'})]).run(flows.wait("job_x", PATIENCE, timeout_s=0))


# Watching

EVENTS = [event(1, "job.created"), event(2, "job.started"), event(3), event(4), event(5, "job.succeeded")]


def page(*events: dict[str, Any], more: bool = False) -> Reply:
    return Reply(200, {"object": "list", "data": list(events), "has_more": more, "next_cursor": None})


def watch(after: int = 0) -> Flow[Any]:
    return flows.watch("job_x", after, PATIENCE)


def test_a_cut_stream_goes_on_after_the_last_event_and_repeats_none():
    replies = [scripted.streamed(*EVENTS[:2]), CUT, scripted.streamed(*EVENTS[1:4]), scripted.streamed(EVENTS[4], end=True)]
    play = Play(replies).run(watch())

    assert play.emitted == EVENTS
    assert [request.headers.get("Last-Event-ID") for request in play.requests] == [None, "2", "2", "4"]


@pytest.mark.parametrize(
    "no_stream",
    [[Reply(200, b"<html>", {"Content-Type": "text/html"})], [scripted.problem(406, "not_acceptable", "JSON alone")],
     [scripted.streamed()] * 3, [scripted.problem(503, "unavailable", "500 streams are open")] * 3],
    ids=["another type", "not acceptable", "held back by a proxy", "no more streams"],
)  # fmt: skip
def test_where_streams_bring_nothing_pages_are_read(no_stream: list[Reply]):
    pages = [page(*EVENTS[:2], more=True), page(EVENTS[2]), Reply(200, job(), {"ETag": '"1"'}), page(*EVENTS[3:])]
    play = Play([*no_stream, *pages]).run(watch())

    assert play.emitted == EVENTS
    assert [dict(request.parameters).get("after") for request in play.requests if request.parameters] == ["0", "2", "3"]


def test_a_stream_with_nothing_but_heartbeats_is_not_given_up():
    play = Play([scripted.streamed(heartbeat=True)] * 9 + [scripted.streamed(*EVENTS, end=True)]).run(watch())

    assert play.emitted == EVENTS


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_watcher_is_told_that_there_is_nothing_to_watch(status: int):
    with pytest.raises(Refused, match="no such job"):
        Play([scripted.problem(status, "some_code", "no such job")]).run(watch())


def test_nothing_is_left_to_watch_after_the_last_event():
    over = Reply(200, job("succeeded"), {"ETag": '"1"'})
    html = Reply(200, b"", {"Content-Type": "text/html"})

    assert Play([Reply(204)]).run(watch(5)).emitted == []
    assert Play([html, page(), over, page()]).run(watch(5)).emitted == []


def test_a_service_that_went_away_is_told_as_such():
    with pytest.raises(Unreachable):
        Play([CUT] * 20).run(watch())


@pytest.mark.parametrize("change", [lambda each: each | {"new": 1}, lambda each: each], ids=["more", "as known"])
def test_fields_of_later_versions_are_kept(change: Callable[[dict[str, Any]], dict[str, Any]]):
    told = change(EVENTS[4])

    assert Play([scripted.streamed(told)]).run(watch()).emitted == [told]
    assert Play([Reply(201, change(job()))]).run(submit()).returned == change(job())
