"""``python -m api``: serve HTTP on the address of the settings until SIGTERM or Ctrl-C."""

from __future__ import annotations

import gc
import socket
import sys
from types import FrameType

import uvicorn

from api.app import create_app
from compression.errors import SlimtrimError
from compression.planner.milp import import_solver
from jobs.database import make_engine
from jobs.key_rows import require_keys
from jobs.logs import configure_logs
from jobs.one_machine import refuse_divided_parts
from jobs.settings import Settings, load_settings

UNREAD_S = 60
"""Seconds for which a client may take nothing of what was sent to it."""
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
        refuse_divided_parts(settings)
        _require_keys(settings)
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
    listener = config.bind_socket()
    prepare(listener)
    # Before anybody is answered: in a thread beside the first requests it made each of them wait for the interpreter.
    import_solver()
    # What was imported stays; a collector that looks through it all stops every answer for a tenth of a second.
    gc.collect()
    gc.freeze()
    Server(config).run(sockets=[listener])
    return 0


def _require_keys(settings: Settings) -> None:
    engine = make_engine(settings)
    try:
        require_keys(settings, engine)
    finally:
        engine.dispose()


def prepare(listener: socket.socket) -> None:
    """Set what accepted connections inherit.

    No waiting for an acknowledgement between the two parts of an answer, which costs a client that sends its requests one by
    one 40 ms each (asyncio sets this only for sockets that name their protocol, and uvicorn's does not). And let the kernel end
    a connection whose client takes nothing for so long.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)


if __name__ == "__main__":
    raise SystemExit(main())
