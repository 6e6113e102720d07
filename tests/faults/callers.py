"""Callers of the service, each in a thread: they post with keys, look, cancel and listen, through whatever breaks."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.faults.history import OVER, History
from tests.faults.house import House

PATIENCE_S = 300.0
"""How long a caller waits for an answer, or for the end of a job."""


class Caller(threading.Thread):
    """One caller, until each of its jobs is over."""

    def __init__(
        self,
        house: House,
        history: History,
        number: int,
        bodies: list[dict[str, Any]],
        *,
        cancels: float = 0.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``cancels``: share of its jobs that it cancels."""
        super().__init__(name=f"caller-{number}", daemon=True)
        self._house, self._history, self._number, self._bodies, self._cancels = house, history, number, bodies, cancels
        self._chance, self._patience_s = random.Random(number), patience_s
        self._owner = ("ann", "bob")[number % 2]
        self.jobs: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the calls; keep what went wrong for whoever waits."""
        try:
            with self._house.client(self._owner) as client:
                self.jobs = [self._post(client, place, body) for place, body in enumerate(self._bodies)]
                unwanted = [job for job in self.jobs if self._chance.random() < self._cancels]  # before streams draw lots too
                streams = [self._listening(job) for job in self.jobs]
                for job in unwanted:
                    self._cancel(client, job)
                for job in self.jobs:
                    self._watch(client, job, {"Prefer": "wait=2"})
                for stream in streams:
                    stream.join(self._patience_s)
        except BaseException as error:
            self.error = error

    def _post(self, client: httpx.Client, place: int, body: dict[str, Any]) -> str:
        key = f"{self._number}-{place}"
        body = {**body, "labels": {"key": key}}

        def send() -> httpx.Response:
            return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})

        return self._until(send, "post", key=key)["id"]

    def _cancel(self, client: httpx.Client, job: str) -> None:
        """Cancel a job: soon, whatever it is about, or, every other pair of callers, once it has finished a block."""
        if self._number % 4 < 2:
            time.sleep(self._chance.random() * 2.0)
        else:
            self._watch(client, job, {}, lambda seen: (seen["progress"] or {}).get("block"))
        self._until(lambda: client.post(f"/v1/jobs/{job}/cancel"), "cancel", job=job)

    def _watch(
        self, client: httpx.Client, job: str, headers: dict[str, str], enough: Callable[[dict[str, Any]], Any] = lambda _: False
    ) -> None:
        """Look until the job is over, or what is seen is enough."""
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            seen = self._until(lambda: client.get(f"/v1/jobs/{job}", headers=headers), "get", job=job)
            if seen["status"] in OVER or enough(seen):
                return
            time.sleep(0.05)
        raise AssertionError(f"{job} was not over after {self._patience_s} s")

    def _until(self, send: Callable[[], httpx.Response], operation: str, **about: Any) -> dict[str, Any]:
        """Call until an answer comes that is not a passing refusal; every try is a note of its own."""
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            note = self._history.begin(operation, **about)
            try:
                answer = send()
            except httpx.HTTPError:
                time.sleep(0.2)
                continue
            if answer.status_code < 300:
                note.answer = answer.json()["id"] if operation == "post" else answer.json()
                note.fate = "ok"
                return answer.json()
            note.fate, note.answer = "refused", answer.json()["code"]
            assert answer.json()["retryable"], f"{operation} {about}: {answer.text}"
            time.sleep(0.2)
        raise AssertionError(f"no answer to {operation} {about} in {self._patience_s} s")

    def _listening(self, job: str) -> threading.Thread:
        thread = threading.Thread(target=self._listen, args=(job,), daemon=True)
        thread.start()
        return thread

    def _listen(self, job: str) -> None:
        """Follow a job's events to the end, cutting the connection by lot and resuming by id."""
        note = self._history.begin("stream", job=job)
        heard: list[tuple[int, str]] = []
        end = time.monotonic() + self._patience_s
        with self._house.client(self._owner) as client:
            while time.monotonic() < end:
                try:
                    if self._hear(client, job, heard):
                        note.fate, note.answer = "ok", heard
                        return
                except (httpx.HTTPError, ValueError):
                    pass
                time.sleep(0.2)

    def _hear(self, client: httpx.Client, job: str, heard: list[tuple[int, str]]) -> bool:
        """Read one connection's events; True when the stream has ended for good."""
        headers = {"Accept": "text/event-stream"}
        if heard:
            headers["Last-Event-ID"] = str(heard[-1][0])
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers, timeout=20.0) as answer:
            if answer.status_code == 204:
                return True
            if answer.status_code != 200:
                return False
            for line in answer.iter_lines():
                field, _, value = line.partition(": ")
                if field == "event" and value == "end":
                    return True
                if field == "data" and value.startswith("{") and "seq" in value:
                    event = json.loads(value)
                    heard.append((event["seq"], event["type"]))
                    if self._chance.random() < 0.05:
                        return False
        return False
