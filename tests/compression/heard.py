"""A listener that keeps what a run tells it."""

from __future__ import annotations

from compression.progress import Event


class Heard:
    """Never asks to stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def should_stop(self) -> bool:
        return False
