"""The servers that a house stands on, and whoever listens to its webhooks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.faults.house import Parts
from tests.servers import S3, Postgres, Redis


@pytest.fixture
def parts(postgres: Postgres, redis_server: Redis, s3: S3) -> Parts:
    return Parts(postgres, redis_server, s3)


@dataclass
class Receiver:
    """Takes what webhooks bring, and refuses every third delivery when it first comes, as receivers do."""

    port: int
    told: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body, delivery = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.headers["webhook-id"]
            is_new = delivery not in seen
            if is_new:
                seen.append(delivery)
            # The first try alone: the second comes after five seconds, the third only after five minutes.
            if is_new and len(seen) % 3 == 0:
                self.send_response(503)
            else:
                taken.told.append(body)
                self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taken = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield taken
    server.shutdown()
    thread.join()
