"""The events a run emits, and the one question it asks: should I stop?

The library reports to a ``Listener`` and knows nothing of who listens: the command line draws a bar,
the worker's child writes a JSON line. ``fraction`` never goes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from compression.errors import Stopped

Stage = Literal[
    "resolving", "fetching", "studying", "planning", "compressing", "recovering", "evaluating", "verifying", "uploading"
]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins."""

    stage: Stage
    fraction: float
    type: Literal["stage"] = "stage"


@dataclass(frozen=True, slots=True)
class BlockDone:
    """One more block of the stage is finished: ``block`` of ``blocks``, counted from 1."""

    stage: Stage
    block: int
    blocks: int
    fraction: float
    message: str
    type: Literal["block"] = "block"


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the caller should know, that does not stop the run."""

    code: str
    message: str
    type: Literal["warning"] = "warning"


@dataclass(frozen=True, slots=True)
class PlanSettled:
    """The plan that is followed from here on, as JSON data, where the one that the run began with was provisional."""

    plan: dict[str, Any]
    type: Literal["plan"] = "plan"


Event = StageStarted | BlockDone | Warned | PlanSettled


def event_to_dict(event: Event) -> dict[str, Any]:
    """Return the event as plain JSON data; ``event_from_dict`` is its inverse."""
    return asdict(event)


def event_from_dict(data: Mapping[str, Any]) -> Event:
    """Return the event that ``event_to_dict`` described."""
    kinds: dict[str, type[Event]] = {"stage": StageStarted, "block": BlockDone, "warning": Warned, "plan": PlanSettled}
    return kinds[data["type"]](**data)


class Listener(Protocol):
    """Whoever follows a run."""

    def on_event(self, event: Event) -> None:
        """Take note of an event; called from the thread that computes, so be brief."""
        ...

    def should_stop(self) -> bool:
        """Say whether the run should end; asked at the end of every block."""
        ...


class Silent:
    """A listener that does not listen."""

    def on_event(self, event: Event) -> None:
        """Ignore the event."""

    def should_stop(self) -> bool:
        """Never stop."""
        return False


class Progress:
    """Turns "block b of stage s" into events with one monotone fraction over all stages."""

    def __init__(self, listener: Listener, shares: Mapping[Stage, float]) -> None:
        """``shares``: relative cost of each stage that this run will pass through, in order."""
        self._listener = listener
        total = sum(shares.values())
        self._start: dict[Stage, float] = {}
        self._share: dict[Stage, float] = {}
        done = 0.0
        for stage, share in shares.items():
            self._start[stage], self._share[stage] = done / total, share / total
            done += share
        self._stage: Stage = next(iter(shares))

    def stage(self, stage: Stage) -> None:
        """Announce that a stage begins; raises ``Stopped`` when the listener wants to stop."""
        self._stage = stage
        self._listener.on_event(StageStarted(stage, round(self._start[stage], 4)))
        self.check()

    def block(self, done: int, blocks: int, message: str) -> None:
        """Announce ``done`` of ``blocks`` in the current stage; raises ``Stopped`` on request."""
        fraction = self._start[self._stage] + self._share[self._stage] * done / blocks
        self._listener.on_event(BlockDone(self._stage, done, blocks, round(min(fraction, 1.0), 4), message))
        self.check()

    def warn(self, code: str, message: str) -> None:
        """Pass a warning on."""
        self._listener.on_event(Warned(code, message))

    def settled(self, plan: dict[str, Any]) -> None:
        """Say which plan is followed from here on."""
        self._listener.on_event(PlanSettled(plan))

    def check(self) -> None:
        """Raise ``Stopped`` when the listener wants to stop."""
        if self._listener.should_stop():
            raise Stopped("stopped on request at a block's end")
