"""The embedded service as seen from outside: traces, logs and metrics of real requests, jobs and processes."""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.checkpoints import write_mixtral
from tests.collector import Collector, a_collector
from tests.servers import free_ports
from tests.worker.stand import Stand, a_stand

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CANARIES = {
    "SLIMTRIM_HF_TOKEN": "hf_CanaryCanaryCanary1",
    "SLIMTRIM_SECRET": "canary-secret-that-signs-links-0001",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret/0001",
    "AWS_SESSION_TOKEN": "canary-session-token-0001",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0001",
}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with a_collector() as running:
        yield running


@pytest.fixture
def house(tmp_path: Path, collector: Collector) -> Iterator[Stand]:
    (port,) = free_ports(1)
    with a_stand(tmp_path, PORT=port, HEARTBEAT_S=0.5) as stand:
        stand.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        write_mixtral(stand.folder / "models" / "mixtral")
        yield stand


def ask(stand: Stand, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    """Return status, text and headers of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{stand.settings.port}{path}", data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.request.HTTPError as refusal:
        return refusal.code, refusal.read().decode(), refusal.headers


def started(stand: Stand) -> list[subprocess.Popen[bytes]]:
    """Start API, maintenance and a worker with the stand-in for the library."""
    processes = [stand.start("api"), stand.start("worker.maintenance"), stand.start_worker("w1")]
    stand.wait(lambda: answers(stand), "an API that is ready")
    return processes


def answers(stand: Stand) -> bool:
    try:
        return ask(stand, "/readyz")[0] == 200
    except OSError:
        return False


def job_of(stand: Stand, ending: str = "success", **headers: str) -> str:
    """Post a job that ends like that, over HTTP."""
    text = json.dumps({"blocks": 3, "block_s": 0.05, "ending": ending})
    body = {
        "model": f"file://{stand.folder / 'models' / 'mixtral'}", "recipe": {"steps": [{"step": "quantize"}]},
        "calibration": {"source": {"inline": [text]}}, "limits": {"max_attempts": 1},
    }  # fmt: skip
    status, answer, _ = ask(stand, "/v1/jobs", body, **{"Content-Type": "application/json", **headers})
    assert status == 201, answer
    return json.loads(answer)["id"]


def lines(stand: Stand) -> list[dict[str, Any]]:
    """Return every line that any process logged; each must be JSON."""
    return [json.loads(line) for path in stand.folder.glob("*.log") for line in path.read_text().splitlines()]


def test_a_job_is_one_trace_from_the_request_to_the_last_block(house: Stand, collector: Collector):
    started(house)
    job_id = job_of(house, traceparent=f"00-{TRACE}-{CALLER}-01", **{"X-Request-Id": "asked-1"})
    house.wait_over(job_id)
    house.wait(lambda: collector.named("attempt"), "the attempt's span")

    (request,) = collector.named("POST /v1/jobs")
    (attempt,) = collector.below(request)
    stages = collector.below(attempt)
    assert (request.service, attempt.service) == ("slimtrim-api", "slimtrim-worker")
    assert (request.trace_id, request.parent_id) == (TRACE, CALLER)
    assert [stage.name for stage in stages] == ["stage fetching", "stage studying", "stage compressing", "stage uploading"]
    blocks = [span for stage in stages for span in collector.below(stage)]
    assert [(span.name, span.attributes["slimtrim.block"]) for span in blocks] == [("block", "1"), ("block", "2"), ("block", "3")]
    for span in (attempt, *stages, *blocks):
        assert (span.trace_id, span.attributes["slimtrim.job_id"]) == (TRACE, job_id)
        assert span.attributes["slimtrim.request_id"] == "asked-1"
        assert attempt.began_ns <= span.began_ns <= span.ended_ns <= attempt.ended_ns
    assert request.attributes["http.response.status_code"] == "201"
    assert attempt.attributes["slimtrim.status"] == "succeeded"


def test_a_collector_that_never_answers_delays_nothing_and_keeps_no_process(tmp_path: Path):

    with socket.socket() as deaf, a_stand(tmp_path, PORT=free_ports(1)[0]) as stand:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        stand.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        write_mixtral(stand.folder / "models" / "mixtral")
        processes = started(stand)

        job = stand.wait_over(job_of(stand))

        assert job.status == "succeeded"
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [-signal.SIGTERM, 0, 0], "uvicorn ends by the signal it was sent"


def test_every_line_is_json_and_those_about_a_job_lead_back_to_its_request(house: Stand):
    started(house)
    job_id = job_of(house, **{"X-Request-Id": "asked-2"})
    house.wait_over(job_id)
    house.wait(lambda: any(line["event"] == "attempt over" for line in lines(house)), "the last line")

    about = [line for line in lines(house) if line.get("job") == job_id]
    assert {line["service"] for line in about} >= {"worker"}
    own = {"job": job_id, "request_id": "asked-2", "attempt": 1, "fence": 1, "worker": "w1"}
    assert [line for line in about if own.items() - line.items()] == []
    printed = [line for line in about if line["event"] == "printed"]
    assert [line["text"] for line in printed] == ["libraries print, and nobody minds"]
    assert any(line["event"] == "request" and line["request_id"] == "asked-2" for line in lines(house))


def test_maintenance_names_request_attempt_and_worker_of_what_it_ends(tmp_path: Path):
    with a_stand(tmp_path, LEASE_S=2) as stand:
        job_id = stand.post_request({"model": f"file://{stand.model}"}, announce=False, request_id="asked-3")
        stand.do(lambda work: work.attempts.claim(job_id, "gone", -1.0))
        stand.start("worker.maintenance")
        stand.wait(lambda: any(line["event"].startswith("lease over") for line in lines(stand)), "the line")

        (line,) = (line for line in lines(stand) if line["event"].startswith("lease over"))
        own = {"job": job_id, "request_id": "asked-3", "attempt": 1, "fence": 1, "worker": "gone"}
        assert not own.items() - line.items()


def test_no_secret_of_the_settings_is_ever_told(house: Stand):
    password = f"canary-{secrets.token_hex(8)}"
    house.environment |= CANARIES | {"SLIMTRIM_S3_PUBLIC_URL": f"http://user:{password}@127.0.0.1:1"}
    started(house)
    good, bad = job_of(house), job_of(house, "unforeseen")
    house.wait_over(good)
    house.wait_over(bad)
    house.wait(lambda: sum(line["event"] == "attempt over" for line in lines(house)) == 2, "both ends")

    _, refused, _ = ask(house, "/v1/jobs", {"model": "nobody/nothing"}, **{"Content-Type": "application/json"})
    told = [house.logs(), refused, *(ask(house, path)[1] for path in ("/readyz", "/metrics", "/openapi.json", "/v1/nowhere"))]
    for job_id in (good, bad):
        told += [ask(house, f"/v1/jobs/{job_id}{part}")[1] for part in ("", "/events", "/report", "/artifact")]
        told += [repr([(row.message, row.figures) for row in house.attempts(job_id)])]
    everything = "\n".join(told)
    assert "unforeseen" not in house.job(bad).model
    assert "secret detail" in everything, "the log has the traceback of the run that failed"
    assert [name for name, value in {**CANARIES, "password": password}.items() if value in everything] == []


def test_metrics_tell_what_a_worker_did(house: Stand):
    started(house)
    house.wait_over(job_of(house))

    text = ask(house, "/metrics")[1]

    assert 'slimtrim_jobs_finished_total{code="",status="succeeded"} 1.0' in text
    assert 'slimtrim_attempts_total{code="",outcome="succeeded"} 1.0' in text
    assert 'slimtrim_block_seconds_count{stage="compressing"} 3.0' in text
    # Three blocks of a thousand bytes and a report of two.
    assert 'slimtrim_moved_bytes_total{direction="stored"} 3002.0' in text
    assert 'slimtrim_http_request_seconds_count{method="POST",route="/v1/jobs",status="201"} 1.0' in text
    assert 'slimtrim_memory_peak_bytes{kind="host"} 0.0' not in text
