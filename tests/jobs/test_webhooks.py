"""A delivery is there exactly when its event is, says what the job is, is signed, and is tried again at its times."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from jobs.endings import Cause
from jobs.settings import Settings
from jobs.tables import WebhookDelivery
from jobs.webhooks import LONGEST_PAYLOAD, SCHEDULE_S, Answer, Outgoing, encoded, main, secret_of, signed_headers
from tests.jobs.conftest import OWNER, SUCCESS, Rows

URL = "https://hooks.example/x?token=t"


def hooked(rows: Rows, *events: str, **request: Any) -> str:
    webhook = {"url": URL, "events": list(events or ("job.succeeded", "job.failed"))}
    return rows.add(request={"model": "m/m", "webhook": webhook, **request})


def deliveries(rows: Rows, job_id: str) -> list[WebhookDelivery]:
    return list(rows.do(lambda work: work.webhooks.of_job(job_id)))


def due(rows: Rows, limit: int = 10, **options: Any) -> list[Outgoing]:
    return list(rows.do(lambda work: work.webhooks.take_due(limit, **options)))


def settle(rows: Rows, outgoing: Outgoing, answer: Answer) -> WebhookDelivery:
    rows.do(lambda work: work.webhooks.settle(outgoing, answer))
    return rows.do(
        lambda work: next(row for row in work.webhooks.of_job(outgoing.payload["data"]["job_id"]) if row.id == outgoing.id)
    )


def force(rows: Rows, **columns: Any) -> None:
    with rows.open_session() as session, session.begin():
        session.execute(update(WebhookDelivery).values(**columns))


def test_only_the_events_that_were_asked_for_are_delivered(rows: Rows):
    job_id = hooked(rows, "job.created", "job.succeeded")
    claim = rows.claim(job_id)
    assert claim is not None
    rows.do(lambda work: work.attempts.succeed(claim, SUCCESS))
    plain = rows.claimed()
    rows.do(lambda work: work.attempts.succeed(plain, SUCCESS))

    assert [(row.payload["type"], row.seq) for row in deliveries(rows, job_id)] == [("job.created", 1), ("job.succeeded", 3)]
    assert deliveries(rows, plain.job_id) == []


def test_a_delivery_is_written_with_its_event_or_not_at_all(rows: Rows):
    job_id = hooked(rows, "job.cancelled")

    def break_off() -> None:
        with rows.work() as work:
            work.jobs.request_cancel(OWNER, job_id)
            assert len(work.webhooks.of_job(job_id)) == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()

    assert (deliveries(rows, job_id), rows.types(job_id)) == ([], ["job.created"])


def test_the_payload_is_the_job_without_plan_and_report(rows: Rows):
    job_id = hooked(rows, labels={"team": "a"})
    rows.force(job_id, plan={"secret": "plan"}, labels={"team": "a"})
    claim = rows.claim(job_id)
    assert claim is not None
    rows.do(lambda work: work.attempts.fail(claim, Cause("disk_full", "no room", retryable=False), 0.0))

    [delivery] = deliveries(rows, job_id)
    payload = delivery.payload

    assert set(payload) == {"type", "timestamp", "data"}
    assert payload["type"] == "job.failed"
    assert (payload["data"]["job_id"], payload["data"]["status"], payload["data"]["sequence"]) == (job_id, "failed", 3)
    assert payload["data"]["job"]["status_reason"]["code"] == "disk_full"
    assert payload["data"]["job"]["labels"] == {"team": "a"}
    assert payload["data"]["job"]["finished_at"].endswith("Z")
    assert not {"plan", "report", "manifest"} & set(payload["data"]["job"])


def test_a_payload_stays_short_whatever_the_job_holds(rows: Rows):
    labels = {f"label{number}": "\U0001f600" * 256 for number in range(16)}
    job_id = hooked(rows, calibration={"source": {"inline": ["x" * 2**20]}})
    rows.force(job_id, labels=labels)
    claim = rows.claim(job_id)
    assert claim is not None
    rows.do(lambda work: work.attempts.fail(claim, Cause("disk_full", "\U0001f600" * 4000, retryable=False), 0.0))

    [delivery] = deliveries(rows, job_id)

    assert len(encoded(delivery.payload)) < LONGEST_PAYLOAD
    assert delivery.payload["data"]["job"]["status_reason"]["code"] == "disk_full"


def test_a_signature_is_that_of_standard_webhooks(tmp_path: Any):
    settings = Settings(data_dir=tmp_path)
    secret = secret_of(settings, "ann")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    body = encoded({"type": "job.failed"})

    headers = signed_headers(secret, "whd_1", 1_700_000_000, body)

    expected = hmac.new(key, b"whd_1.1700000000." + body, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    assert (headers["webhook-id"], headers["webhook-timestamp"], len(key)) == ("whd_1", "1700000000", 32)
    assert secret_of(settings, "bob") != secret == secret_of(settings, "ann")
    assert secret_of(Settings(data_dir=tmp_path, secret="s"), "ann") == secret_of(
        Settings(data_dir=tmp_path / "x", secret="s"), "ann"
    )
    assert secret_of(Settings(data_dir=tmp_path, secret="s"), "ann") != secret


def test_the_command_shows_the_secret(rows: Rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SLIMTRIM_DATA_DIR", str(rows.settings.data_dir))

    assert main(["secret", "ann"]) == 0
    assert capsys.readouterr().out.strip() == secret_of(rows.settings, "ann")
    assert main([]) == main(["secrets"]) == 2


def test_what_is_taken_is_not_due_again_until_its_sender_must_be_dead(rows: Rows):
    hooked(rows, "job.created")

    [first] = due(rows)
    assert due(rows) == []
    force(rows, due_at=first_due(rows) - timedelta(seconds=61))
    [second] = due(rows)

    assert (first.id, first.tries, second.id, second.tries) == (second.id, 1, first.id, 2)
    assert (first.owner, first.url, first.receiver) == (OWNER, URL, "hooks.example")


def first_due(rows: Rows):
    with rows.open_reader() as session:
        return session.query(WebhookDelivery).one().due_at


def test_a_failing_delivery_is_tried_at_its_times_and_then_given_up(rows: Rows):
    job_id = hooked(rows, "job.created")
    waits: list[float] = []
    for _ in range(len(SCHEDULE_S)):
        force(rows, due_at=deliveries(rows, job_id)[0].created_at)
        [outgoing] = due(rows)
        row = settle(rows, outgoing, Answer(500, "the receiver answered 500"))
        waits.append((row.due_at - row.created_at).total_seconds())

    for tried, (wait, step) in enumerate(zip(waits[:-1], SCHEDULE_S[1:], strict=True)):
        # Between the step and a tenth more; created_at lies some seconds before "now" at most.
        assert step <= wait + 0.01, tried
        assert wait <= step * 1.1 + 60
    assert (row.state, row.tries, row.status_code) == ("failed", 10, 500)
    force(rows, due_at=row.created_at)
    assert due(rows) == []


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (Answer(204), "delivered"),
        (Answer(410, "gone"), "failed"),
        (Answer(302, "moved"), "pending"),
        (Answer(None, "late"), "pending"),
    ],
)
def test_an_answer_decides_what_becomes_of_a_delivery(rows: Rows, answer: Answer, state: str):
    job_id = hooked(rows, "job.created")
    [outgoing] = due(rows)

    row = settle(rows, outgoing, answer)

    assert (row.state, row.status_code, row.error) == (state, answer.status, answer.error)
    assert (row.delivered_at is not None) == (state == "delivered")
    assert deliveries(rows, job_id)[0].id == row.id


def test_a_receiver_may_ask_for_more_time_but_not_for_all_of_it(rows: Rows):
    hooked(rows, "job.created")
    [outgoing] = due(rows)

    patient = settle(rows, outgoing, Answer(429, "later", retry_after_s=600))
    assert 600 <= (patient.due_at - patient.created_at).total_seconds() <= 600 * 1.1 + 60
    endless = settle(rows, outgoing, Answer(503, "later", retry_after_s=1e9))
    assert (endless.due_at - endless.created_at).total_seconds() <= 86_400 * 1.1 + 60


def test_a_receiver_with_many_deliveries_leaves_room_for_another(rows: Rows):
    for _ in range(5):
        hooked(rows, "job.created")
    other = rows.add(request={"webhook": {"url": "https://other.example/", "events": ["job.created"]}})

    taken = due(rows, each=2)
    more = due(rows, busy=["hooks.example"], each=2)

    assert sorted(outgoing.receiver for outgoing in taken) == ["hooks.example", "hooks.example", "other.example"]
    assert [outgoing.payload["data"]["job_id"] for outgoing in taken if outgoing.receiver == "other.example"] == [other]
    assert more == []


def test_a_deleted_job_is_still_told_of_and_what_was_told_goes_with_it(rows: Rows):
    job_id = hooked(rows, "job.created", "job.cancelled")
    [outgoing] = due(rows)
    settle(rows, outgoing, Answer(200))
    rows.do(lambda work: work.jobs.request_cancel(OWNER, job_id))
    rows.do(lambda work: work.jobs.delete(OWNER, job_id))

    assert [row.payload["type"] for row in deliveries(rows, job_id)] == ["job.cancelled"]


def test_old_rows_are_forgotten_once_they_have_ended(rows: Rows):
    job_id = hooked(rows, "job.created", "job.started")
    [outgoing] = due(rows)
    settle(rows, outgoing, Answer(200))
    rows.claim(job_id)
    force(rows, created_at=deliveries(rows, job_id)[0].created_at - timedelta(days=31))

    rows.do(lambda work: work.webhooks.forget())

    assert [row.state for row in deliveries(rows, job_id)] == ["pending"]


def test_a_payload_is_plain_json(rows: Rows):
    job_id = hooked(rows, "job.created")

    assert json.loads(encoded(deliveries(rows, job_id)[0].payload))["data"]["job"]["status"] == "queued"
