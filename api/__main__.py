"""``python -m api``: serve HTTP on the address of the settings until SIGTERM or Ctrl-C."""

from __future__ import annotations

import sys
from types import FrameType

import uvicorn

from api.app import create_app
from compression.errors import SlimtrimError
from jobs.logs import configure_logs
from jobs.settings import load_settings

_GRACE_S = 15
"""Seconds that open requests have to end once the service was told to stop."""


class Server(uvicorn.Server):
    """Tells the routes before it stops listening, so that nothing new is accepted and whoever waits is answered."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self.config.app.state.service.draining.set()  # pyright: ignore
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until told to stop; 2 when the settings forbid it."""
    try:
        settings = load_settings()
    except SlimtrimError as refusal:
        sys.stderr.write(f"{refusal.message}\n")
        return 2
    configure_logs(service="api")
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        access_log=False,  # links carry a signature in their query
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=32 * 1024,
        log_config=None,
    )
    Server(config).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
