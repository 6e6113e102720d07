"""Logs are JSON lines with fields, and what looks like a secret is not in them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from jobs.keys import new_key
from jobs.logs import Fields, JsonLines


def line(message: str, *, error: bool = False, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("worker", logging.WARNING, "file.py", 1, message, (), None)
    vars(record).update(extra)
    if error:
        try:
            raise ValueError(message)
        except ValueError:
            record.exc_info = sys.exc_info()
    return json.loads(JsonLines(service="worker").format(record))


def test_a_line_has_its_event_and_every_field():
    found = line("claimed", job="job_1", fence=3)

    assert str(found.pop("at")).endswith("Z")
    assert found == {"level": "warning", "event": "claimed", "logger": "worker", "service": "worker", "job": "job_1", "fence": 3}


def test_a_traceback_stays_on_the_line():
    found = line("two\nlines", error=True)

    assert found["event"] == "two\nlines"
    assert "ValueError: two" in str(found["error"])


def test_what_looks_like_a_secret_is_blanked_wherever_it_stands():
    key, _ = new_key("ann")

    text = json.dumps(line(f"failed with hf_abcdefghijklmnop and {key}", error=True, header=f"Authorization: Bearer {key}"))

    assert "hf_abcdefg" not in text
    assert key not in text
    assert "[secret]" in text


def test_a_logger_with_fields_adds_them_to_its_own():
    logger = Fields(logging.getLogger("x"), {"job": "job_1", "fence": 1})

    _, how = logger.process("m", {"extra": {"fence": 2, "code": "c"}})

    assert how["extra"] == {"job": "job_1", "fence": 2, "code": "c"}


def test_every_line_of_a_configured_process_is_json():
    program = "import logging, jobs.logs; jobs.logs.configure_logs(service='s'); logging.info('hello', extra={'job': 1})"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    (only,) = done.stderr.splitlines()
    assert json.loads(only)["job"] == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("key AKIACANARYCANARY0001 refused", "AKIACANARYCANARY0001"),
        ("GET /x?X-Amz-Credential=AK%2F2026&X-Amz-Signature=0badc0de&n=1", "0badc0de"),
        ("GET /x?X-Amz-Credential=AK%2F2026&X-Amz-Signature=0badc0de&n=1", "AK%2F2026"),
        ("signed with whsec_MfKQ9r8GKYqrTwjU", "whsec_MfKQ9r8GKYqrTwjU"),
        ("postgresql://slimtrim:hunter2@db/x does not answer", "hunter2"),
        ("redis://:hunter2@host:6379/0", "hunter2"),
        ("Authorization: Basic dXNlcjpodW50ZXIy", "dXNlcjpodW50ZXIy"),
        ("authorization=hunter2hunter2", "hunter2hunter2"),
    ],
)
def test_every_kind_of_secret_is_blanked_and_the_rest_of_the_line_stays(text: str, secret: str):
    told = str(line(text)["event"])

    assert secret not in told
    assert told.split()[0][:3] == text.split()[0][:3]


def test_what_the_environment_holds_is_blanked_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plain words/of+nothing")
    monkeypatch.setenv("SLIMTRIM_DATABASE_URL", "postgresql://u:p%40ss-word@h/d")

    told = json.dumps(line("plain words/of+nothing, p@ss-word and p%40ss-word"))

    assert told.count("[secret]") == 3


def test_addresses_without_a_password_and_plain_words_stay():
    text = "http://host:8000/a?b=c s3://bucket/key basic facts, 12 tokens"

    assert line(text)["event"] == text
