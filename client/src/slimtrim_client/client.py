"""The client for ordinary code: one method per verb. ``aio.py`` has the same for event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx

from slimtrim_client import flows, messages
from slimtrim_client.aio import AsyncClient
from slimtrim_client.connection import Connection, answer_of, failed_of
from slimtrim_client.documents import Body, Event, Job, JobList, Manifest, Plan, Report
from slimtrim_client.downloads import Download, OnProgress
from slimtrim_client.flows import Close, Emit, Flow, Open, Read, Reply, Send, Sleep
from slimtrim_client.messages import HTML
from slimtrim_client.retries import Patience

T = TypeVar("T")


class Client:
    """Speaks with one service.

    ``url``: default ``SLIMTRIM_URL``, else this machine. ``key``: default ``SLIMTRIM_API_KEY``, or what the file in
    ``SLIMTRIM_API_KEY_FILE`` holds; an empty one means none. Every call is sent again while the service cannot be reached or asks
    for it, ``patience`` says how often; a job is created once all the same. May be used by several threads.
    """

    def __init__(self, url: str | None = None, *, key: str | None = None, patience: Patience | None = None) -> None:
        self._connection = Connection.of(url, key, patience)
        self._http = httpx.Client(**self._connection.options())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def connection(self) -> Connection:
        """Where to, as whom, and how patiently."""
        return self._connection

    def plan(self, body: Body) -> Plan:
        """Return what the request would do; nothing is kept."""
        return self._document(messages.post_plan(body))

    def submit(self, body: Body, *, idempotency_key: str | None = None) -> Job:
        """Create a job. With a key of your own, a call that is repeated later gives the same job."""
        return self._run(flows.submit(body, idempotency_key, self._patience))

    def job(self, job_id: str) -> Job:
        """Return the job as it is now."""
        return self._document(messages.get_job(job_id))

    def list(
        self, *, status: Iterable[str] = (), model: str | None = None, labels: Mapping[str, str] | None = None,
        limit: int = 20, after: str | None = None,
    ) -> JobList:  # fmt: skip
        """Return a page of jobs, newest first; ``after`` is the ``next_cursor`` of the page before."""
        return self._document(messages.list_jobs(status=status, model=model, labels=labels, limit=limit, after=after))

    def follow(self, job_id: str, *, timeout_s: float | None = None) -> Iterator[Job]:
        """Yield the job now and each time it has changed, until it is over; TookTooLong after the timeout."""
        return self._iterate(flows.follow(job_id, self._patience, timeout_s))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Return the job once it is over, however it ended; TookTooLong after the timeout."""
        return self._run(flows.wait(job_id, self._patience, timeout_s))

    def watch(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield every event after a number as it happens, each once, until the job's last."""
        return self._iterate(flows.watch(job_id, after, self._patience))

    def report(self, job_id: str) -> Report:
        """Return what was done and what it cost."""
        return self._document(messages.get_report(job_id))

    def report_page(self, job_id: str) -> str:
        """Return the report as an HTML page."""
        return self._run(flows.page(job_id, HTML, self._patience))

    def manifest(self, job_id: str) -> Manifest:
        """Return which files the artifact has, with fresh links."""
        return self._document(messages.get_manifest(job_id))

    def download(self, job_id: str, folder: str | Path, *, parallel: int = 4, on_progress: OnProgress | None = None) -> Download:
        """Fetch the artifact into a folder; what lies there already, whole or in part, is used.

        Runs an event loop in a thread of its own, which also calls ``on_progress(path, bytes so far, bytes)``.
        """
        connection = self._connection

        async def work() -> Download:
            async with AsyncClient(connection.url, key=connection.key or "", patience=connection.patience) as client:
                return await client.download(job_id, folder, parallel=parallel, on_progress=on_progress)

        return _on_a_loop(work)

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end and return the job; one that is over stays as it is."""
        return self._document(messages.cancel_job(job_id))

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Return a new job that goes on where this one failed or was cancelled."""
        return self._run(flows.retry(job_id, idempotency_key, self._patience))

    def delete(self, job_id: str) -> None:
        """Remove a job that is over, and its artifact."""
        self._run(flows.delete(job_id, self._patience))

    @property
    def _patience(self) -> Patience:
        return self._connection.patience

    def _document(self, request: messages.Request) -> Any:
        return self._run(flows.document(request, self._patience))

    def _run(self, flow: Flow[T]) -> T:
        steps = self._steps(flow)
        try:
            next(steps)
        except StopIteration as stop:
            return cast(T, stop.value)
        raise AssertionError("only flows that are iterated emit anything")

    def _iterate(self, flow: Flow[None]) -> Iterator[Any]:
        with closing(self._steps(flow)) as steps:
            yield from steps

    def _steps(self, flow: Flow[T]) -> Generator[Any, None, T]:
        """Do what the flow says; yield what it emits, return what it returns."""
        reply: Reply = None
        with _Stream(self._http, self._connection) as stream:
            while True:
                try:
                    command = flow.send(reply)
                except StopIteration as stop:
                    return stop.value
                reply = None
                match command:
                    case Send(request):
                        reply = stream.open(request, whole=True)
                    case Sleep(seconds):
                        time.sleep(seconds)
                    case Open(request):
                        reply = stream.open(request)
                    case Read():
                        reply = stream.read()
                    case Close():
                        stream.close()
                    case Emit(value):
                        yield value


class _Stream:
    """At most one open answer."""

    def __init__(self, http: httpx.Client, connection: Connection) -> None:
        self._http, self._connection = http, connection
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, request: messages.Request, *, whole: bool = False) -> messages.Answer | messages.Failed:
        """Send; read all of the answer, or of a good one nothing yet."""
        self.close()
        try:
            response = self._http.send(self._http.build_request(**self._connection.arguments(request)), stream=True)
            self._response, self._chunks = response, response.iter_bytes()
            if not whole and response.is_success:
                return answer_of(response)
            answer = answer_of(response, response.read())
        except httpx.HTTPError as error:
            self.close()
            return failed_of(error, self._connection.url)
        self.close()
        return answer

    def read(self) -> bytes | messages.Failed:
        try:
            return next(self._chunks, b"")
        except httpx.HTTPError as error:
            return failed_of(error, self._connection.url)

    def close(self) -> None:
        self._chunks = iter(())
        if self._response is not None:
            self._response.close()
            self._response = None


def _on_a_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it in a thread with an event loop, since the caller's may have one already; an interruption here cancels it there."""
    begun, ended = threading.Event(), threading.Event()
    task: asyncio.Task[T] | None = None
    loop: asyncio.AbstractEventLoop | None = None

    async def main() -> None:
        nonlocal task, loop
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
        begun.set()
        await asyncio.wait({task})

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            begun.set()
            ended.set()

    thread = threading.Thread(target=run, name="slimtrim-download", daemon=True)
    thread.start()
    try:
        ended.wait()
    except BaseException:
        begun.wait()
        if loop is not None and task is not None:
            with suppress(RuntimeError):  # the loop ended at this very moment
                loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    thread.join()
    assert task is not None
    return task.result()
