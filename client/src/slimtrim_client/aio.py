"""The client for event loops (asyncio): the same verbs as ``client.py``, to be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from slimtrim_client import flows, messages
from slimtrim_client.connection import Connection, answer_of, failed_of
from slimtrim_client.documents import Body, Event, Job, JobList, Manifest, Plan, Report
from slimtrim_client.downloads import Download, OnProgress, download
from slimtrim_client.flows import Close, Emit, Flow, Open, Read, Reply, Send, Sleep
from slimtrim_client.messages import HTML
from slimtrim_client.retries import Patience

T = TypeVar("T")


class AsyncClient:
    """Speaks with one service; arguments and methods as ``Client``."""

    def __init__(self, url: str | None = None, *, key: str | None = None, patience: Patience | None = None) -> None:
        self._connection = Connection.of(url, key, patience)
        self._http = httpx.AsyncClient(**self._connection.options())

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def connection(self) -> Connection:
        """Where to, as whom, and how patiently."""
        return self._connection

    async def plan(self, body: Body) -> Plan:
        """Return what the request would do; nothing is kept."""
        return await self._document(messages.post_plan(body))

    async def submit(self, body: Body, *, idempotency_key: str | None = None) -> Job:
        """Create a job. With a key of your own, a call that is repeated later gives the same job."""
        return await self._run(flows.submit(body, idempotency_key, self._patience))

    async def job(self, job_id: str) -> Job:
        """Return the job as it is now."""
        return await self._document(messages.get_job(job_id))

    async def list(
        self, *, status: Iterable[str] = (), model: str | None = None, labels: Mapping[str, str] | None = None,
        limit: int = 20, after: str | None = None,
    ) -> JobList:  # fmt: skip
        """Return a page of jobs, newest first; ``after`` is the ``next_cursor`` of the page before."""
        return await self._document(messages.list_jobs(status=status, model=model, labels=labels, limit=limit, after=after))

    def follow(self, job_id: str, *, timeout_s: float | None = None) -> AsyncIterator[Job]:
        """Yield the job now and each time it has changed, until it is over; TookTooLong after the timeout."""
        return self._iterate(flows.follow(job_id, self._patience, timeout_s))

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Return the job once it is over, however it ended; TookTooLong after the timeout."""
        return await self._run(flows.wait(job_id, self._patience, timeout_s))

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Yield every event after a number as it happens, each once, until the job's last."""
        return self._iterate(flows.watch(job_id, after, self._patience))

    async def report(self, job_id: str) -> Report:
        """Return what was done and what it cost."""
        return await self._document(messages.get_report(job_id))

    async def report_page(self, job_id: str) -> str:
        """Return the report as an HTML page."""
        return await self._run(flows.page(job_id, HTML, self._patience))

    async def manifest(self, job_id: str) -> Manifest:
        """Return which files the artifact has, with fresh links."""
        return await self._document(messages.get_manifest(job_id))

    async def download(
        self, job_id: str, folder: str | Path, *, parallel: int = 4, on_progress: OnProgress | None = None
    ) -> Download:
        """Fetch the artifact into a folder; what lies there already, whole or in part, is used.

        ``on_progress(path, bytes so far, bytes)`` is called on the event loop.
        """
        return await download(
            self._http, lambda: self.manifest(job_id), Path(folder),
            parallel=parallel, patience=self._patience, on_progress=on_progress,
        )  # fmt: skip

    async def cancel(self, job_id: str) -> Job:
        """Ask for the job's end and return the job; one that is over stays as it is."""
        return await self._document(messages.cancel_job(job_id))

    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Return a new job that goes on where this one failed or was cancelled."""
        return await self._run(flows.retry(job_id, idempotency_key, self._patience))

    async def delete(self, job_id: str) -> None:
        """Remove a job that is over, and its artifact."""
        await self._run(flows.delete(job_id, self._patience))

    @property
    def _patience(self) -> Patience:
        return self._connection.patience

    async def _document(self, request: messages.Request) -> Any:
        return await self._run(flows.document(request, self._patience))

    async def _run(self, flow: Flow[T]) -> T:
        reply: Reply = None
        async with _Stream(self._http, self._connection) as stream:
            while True:
                try:
                    command = flow.send(reply)
                except StopIteration as stop:
                    return stop.value
                assert not isinstance(command, Emit), "only flows that are iterated emit anything"
                reply = await stream.perform(command)

    async def _iterate(self, flow: Flow[None]) -> AsyncGenerator[Any, None]:
        reply: Reply = None
        async with _Stream(self._http, self._connection) as stream:
            while True:
                try:
                    command = flow.send(reply)
                except StopIteration:
                    return
                reply = None
                if isinstance(command, Emit):
                    yield command.value
                else:
                    reply = await stream.perform(command)


class _Stream:
    """At most one open answer."""

    def __init__(self, http: httpx.AsyncClient, connection: Connection) -> None:
        self._http, self._connection = http, connection
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def __aenter__(self) -> _Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def perform(self, command: Send | Sleep | Open | Read | Close) -> Reply:
        """Do what the flow says."""
        match command:
            case Send(request):
                return await self._open(request, whole=True)
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Open(request):
                return await self._open(request)
            case Read():
                return await self._read()
            case Close():
                await self._close()
        return None

    async def _open(self, request: messages.Request, *, whole: bool = False) -> messages.Answer | messages.Failed:
        await self._close()
        try:
            response = await self._http.send(self._http.build_request(**self._connection.arguments(request)), stream=True)
            self._response, self._chunks = response, response.aiter_bytes()
            if not whole and response.is_success:
                return answer_of(response)
            answer = answer_of(response, await response.aread())
        except httpx.HTTPError as error:
            await self._close()
            return failed_of(error, self._connection.url)
        await self._close()
        return answer

    async def _read(self) -> bytes | messages.Failed:
        try:
            return b"" if self._chunks is None else await anext(self._chunks, b"")
        except httpx.HTTPError as error:
            return failed_of(error, self._connection.url)

    async def _close(self) -> None:
        self._chunks = None
        if self._response is not None:
            response, self._response = self._response, None
            await response.aclose()
