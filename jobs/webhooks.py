"""Deliveries of events to a job's webhook: which there are, what they say, how they are signed, when they are tried again.

A delivery is a row that is written in the event's own transaction, so there is one exactly when there is the event.
Form and signature are those of Standard Webhooks 1.0. ``worker/webhooks.py`` sends them; at least once, in no promised
order. ``python -m jobs.webhooks secret OWNER`` shows a caller's secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from compression.errors import SlimtrimError
from jobs.clock import moment, now
from jobs.ids import new_id
from jobs.secret import derived_key
from jobs.settings import Settings, load_settings
from jobs.tables import Document, Job, JobEvent, WebhookDelivery

LONGEST_PAYLOAD = 20_000
"""Bytes; what makes a payload longer is left out of it."""
SCHEDULE_S = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Seconds before each try, counted from the try before."""
KEPT_S = 30 * 86_400
"""Seconds for which the row of a delivery is kept once it has ended."""
_CLAIM_S = 60
"""Seconds after which a delivery whose sender fell silent is tried again; longer than any try takes."""
_JITTER = 0.1
_MESSAGE = 500
_TIMES = ("created_at", "queued_at", "started_at", "cancelling_at", "finished_at")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A delivery that was taken to be sent now."""

    id: str
    owner: str
    url: str
    receiver: str
    payload: Document
    tries: int
    """With this one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a try: a status, or none and the reason; and the seconds that the receiver wants to be left alone."""

    status: int | None
    error: str | None = None
    retry_after_s: float = 0.0

    @property
    def is_success(self) -> bool:
        """Whether the receiver has it."""
        return self.status is not None and 200 <= self.status < 300


class WebhookRepository:
    """The deliveries, over one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def take_due(self, limit: int, busy: Collection[str] = (), *, each: int = 1) -> Sequence[Outgoing]:
        """Take deliveries whose time has come, a few for each receiver that is not busy; a try counts when it begins."""
        due = WebhookDelivery.state == "pending", WebhookDelivery.due_at <= now()
        turn = func.row_number().over(partition_by=WebhookDelivery.receiver, order_by=WebhookDelivery.due_at).label("turn")
        ranked = select(WebhookDelivery.id, WebhookDelivery.due_at, turn).where(*due, WebhookDelivery.receiver.not_in(busy))
        rows = ranked.subquery()
        query = select(rows.c.id).where(rows.c.turn <= each).order_by(rows.c.turn, rows.c.due_at).limit(limit)
        taken = [self._take(delivery_id, due) for delivery_id in self._session.scalars(query).all()]
        return [outgoing for outgoing in taken if outgoing is not None]

    def settle(self, outgoing: Outgoing, answer: Answer) -> str:
        """Record what came of a try; return the delivery's state after it."""
        state = _state_after(outgoing, answer)
        values: Document = {"state": state, "status_code": answer.status, "error": answer.error}
        if state == "pending":
            values["due_at"] = now(_delay_s(outgoing.tries, answer))
        elif state == "delivered":
            values["delivered_at"] = now()
        mine = WebhookDelivery.id == outgoing.id, WebhookDelivery.state == "pending"
        self._session.execute(update(WebhookDelivery).where(*mine).values(**values))
        return state

    def forget(self) -> None:
        """Drop deliveries that ended long ago."""
        old = WebhookDelivery.state != "pending", WebhookDelivery.created_at < now(-KEPT_S)
        self._session.execute(delete(WebhookDelivery).where(*old))

    def of_job(self, job_id: str) -> Sequence[WebhookDelivery]:
        """Return the job's deliveries, first one first."""
        query = select(WebhookDelivery).where(WebhookDelivery.job_id == job_id).order_by(WebhookDelivery.seq)
        return self._session.scalars(query).all()

    def _take(self, delivery_id: str, due: tuple[object, ...]) -> Outgoing | None:
        # The condition is repeated: of two senders that saw the row, one moves its time and the other finds it moved.
        statement = (
            update(WebhookDelivery)
            .where(WebhookDelivery.id == delivery_id, *due)  # pyright: ignore[reportArgumentType]
            .values(due_at=now(_CLAIM_S), tries=WebhookDelivery.tries + 1)
            .returning(WebhookDelivery)
            .execution_options(populate_existing=True, synchronize_session=False)
        )
        row = self._session.scalars(statement).one_or_none()
        if row is None:
            return None
        owner = self._session.scalar(select(Job.owner).where(Job.id == row.job_id))
        return Outgoing(row.id, owner or "", row.url, row.receiver, row.payload, row.tries)


def note_delivery(session: Session, job: Job, event: JobEvent) -> None:
    """Write the delivery of an event that the job's webhook asks for."""
    webhook = job.request.get("webhook")
    if webhook is None or event.type not in webhook["events"]:
        return
    delivery = WebhookDelivery(
        id=new_id("whd_"), job_id=job.id, seq=event.seq, url=webhook["url"], receiver=webhook_receiver(webhook["url"]),
        payload=payload_of(job, event),
    )  # fmt: skip
    session.add(delivery)
    session.flush()


def webhook_receiver(url: str) -> str:
    """Return the part of a url that says whom it reaches: host and port, without what may be secret."""
    return url.partition("://")[2].partition("/")[0].partition("?")[0].lower()[:300]


def payload_of(job: Job, event: JobEvent) -> Document:
    """Return what is sent: the event, and the job as it was then, without plan and report."""
    snapshot: Document = {
        "id": job.id, "object": "job", "status": str(job.status), "stage": job.stage, "status_reason": job.status_reason,
        "progress": job.progress, "request": job.request, "resolved": job.resolved, "result": job.result,
        "attempt": job.attempt, "max_attempts": job.max_attempts, "labels": job.labels, "retry_of": job.retry_of,
        **{name: moment(getattr(job, name)) for name in _TIMES},
        "links": {"self": f"/v1/jobs/{job.id}"},
    }  # fmt: skip
    data: Document = {"job_id": job.id, "status": str(job.status), "sequence": event.seq, "job": snapshot}
    payload: Document = {"type": event.type, "timestamp": moment(event.at), "data": data}
    shorter: list[Document] = [
        {"request": None},
        {"status_reason": _shortened(job.status_reason)},
        {"labels": None},
        {"result": None},
    ]
    for change in shorter:
        if len(encoded(payload)) < LONGEST_PAYLOAD:
            break
        snapshot |= change
    return payload


def encoded(payload: Mapping[str, object]) -> bytes:
    """Return the bytes that are signed and sent."""
    return json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()


def secret_of(settings: Settings, owner: str) -> str:
    """Return the secret with which deliveries to this caller are signed, as Standard Webhooks writes it."""
    return "whsec_" + base64.b64encode(derived_key(settings, f"webhook {owner}")).decode()


def signed_headers(secret: str, delivery_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers by which a receiver knows a delivery as ours, as fresh, and as the one that it has already."""
    message = f"{delivery_id}.{timestamp}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.new(key, message, hashlib.sha256).digest()).decode()
    return {"webhook-id": delivery_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def _state_after(outgoing: Outgoing, answer: Answer) -> str:
    if answer.is_success:
        return "delivered"
    return "failed" if answer.status == 410 or outgoing.tries >= len(SCHEDULE_S) else "pending"


def _delay_s(tries: int, answer: Answer) -> float:
    """Never earlier than the receiver wants, nor later than a day; spread, so that a receiver is not met by all at once."""
    wanted = min(answer.retry_after_s, SCHEDULE_S[-1])
    return max(SCHEDULE_S[tries], wanted) * random.uniform(1.0, 1.0 + _JITTER)


def _shortened(reason: Document | None) -> Document | None:
    return None if reason is None else {**reason, "message": str(reason["message"])[:_MESSAGE]}


def main(arguments: Sequence[str]) -> int:
    """Write a caller's secret to standard output."""
    match list(arguments):
        case ["secret", owner]:
            try:
                sys.stdout.write(f"{secret_of(load_settings(), owner)}\n")
            except SlimtrimError as refusal:
                sys.stderr.write(f"{refusal.message}\n")
                return 2
            return 0
        case _:
            sys.stderr.write("usage: python -m jobs.webhooks secret OWNER\n")
            return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
