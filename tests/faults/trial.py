"""One trial: callers call, faults fall, and when all is quiet the history is checked against database and bucket."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jobs.settings import Settings
from jobs.tables import Job
from tests.faults.callers import PATIENCE_S, Caller
from tests.faults.history import History, World, check, leftovers
from tests.faults.house import House
from worker.maintenance import Maintenance

Fault = Callable[[House, random.Random], None]
_TRANSFER_S = 30.0
"""Seconds that a transfer may go on after its attempt."""


def kill(house: House, chance: random.Random) -> None:
    """SIGKILL of a member, or of the process in which a job runs."""
    house.kill_somebody(chance)


def restart_redis(house: House, _: random.Random) -> None:
    """The broker is killed and comes back with what its append-only file holds."""
    house.parts.redis.server.restart(kill=True)


def restart_postgres(house: House, _: random.Random) -> None:
    """The database ends at once, as with ``pg_ctl -m immediate``, and recovers."""
    house.parts.postgres.server.restart(kill=True)


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    statuses: Counter[str]
    attempts: int
    kills: Counter[str]
    """By what the victim did."""
    manifests: dict[str, str]
    """Of succeeded jobs: label ``key`` -> sha256 of the manifest."""
    seconds: float


def trial(
    house: House, bodies: Sequence[Sequence[dict[str, Any]]], faults: Sequence[Fault], *, seed: int, gap_s: tuple[float, float],
    cancels: float = 0.0, told: Sequence[dict[str, Any]] = (), first: int = 0,
    patience_s: float = PATIENCE_S,
) -> Outcome:  # fmt: skip
    """Let one caller per list of bodies make its calls while faults fall, a random gap apart; check, and tell what came of it.

    ``told``: what the webhooks' receiver takes meanwhile. ``first``: number of the first caller, where others were here before.
    ``patience_s``: seconds after which a caller says that its job will never end.
    """
    history, chance, began = History(), random.Random(seed), time.monotonic()
    callers = [
        Caller(house, history, number, list(own), cancels=cancels, patience_s=patience_s)
        for number, own in enumerate(bodies, start=first)
    ]
    for caller in callers:
        caller.start()
    for fault in faults:
        time.sleep(chance.uniform(*gap_s))
        if not any(caller.is_alive() for caller in callers):
            break
        fault(house, chance)
    for caller in callers:
        caller.join()
        if caller.error is not None:
            raise AssertionError(f"{caller.name} (seed {seed}): {caller.error}\n{house.stand.logs()[-20_000:]}") from caller.error
    world = settled(house, told, {job for caller in callers for job in caller.jobs})
    check(history, world)
    return _outcome(house, world, time.monotonic() - began)


def settled(house: House, told: Sequence[dict[str, Any]], known: set[str]) -> World:
    """Wait for webhooks, let the maintenance clean up, and return how things stand; ``known``: jobs that callers know of."""
    stand = house.stand
    everything = stand.jobs()
    # Not only those that are known: a POST whose answer got lost may have made a second one. Those of an earlier trial are over.
    jobs = [job for job in everything if job.id in known or job.id > min(known)]
    before = [job for job in everything if job not in jobs]
    ends = {(job.id, f"job.{job.status}"): (job.request.get("webhook") or {"events": ()})["events"] for job in jobs}
    wanted = {end for end, events in ends.items() if end[1] in events}
    stand.wait(lambda: wanted <= {(body["data"]["job_id"], body["type"]) for body in list(told)}, "every webhook", 180.0)
    stand.wait(lambda: not any(stand.child_of(member) for member in house.members.values()), "the last child's end")
    # A worker's last transfer may outlive its attempt by as long as the request takes; what it stored goes a round later.
    end = time.monotonic() + _TRANSFER_S
    while leftovers(world := _look(house, told, jobs, before)) and time.monotonic() < end:
        time.sleep(1.0)
    return world


def _look(house: House, told: Sequence[dict[str, Any]], jobs: Sequence[Job], before: Sequence[Job]) -> World:
    """Clean up, and return how things stand with ``jobs``; ``before``: those of earlier trials."""
    stand = house.stand
    _clean(stand.settings)
    earlier = {job.id for job in before}
    return World(
        jobs=jobs,
        events={job.id: stand.events(job.id) for job in jobs},
        attempts={job.id: stand.attempts(job.id) for job in jobs},
        manifests={job.id: _manifest(house, job) for job in jobs if job.artifact_prefix is not None},
        parts=[part for part in stand.parts() if part.job_id not in earlier],
        keys=[key for key in house.stored() if not any(job_id in key for job_id in earlier)],
        read=house.read,
        orphan_uploads=house.orphan_uploads(),
        told=list(told),
    )


def _clean(settings: Settings) -> None:
    """Do at once what the maintenance does every minute."""
    maintenance = Maintenance(settings)
    for _ in range(3):  # rows of blocks first, then what no row names any more
        with suppress(OSError):
            maintenance.clean()
    maintenance.engine.dispose()


def _manifest(house: House, job: Job) -> dict[str, Any]:
    manifest = house.stand.do(lambda work: work.jobs.manifest(job.owner, job.id))
    assert manifest is not None
    return manifest


def _outcome(house: House, world: World, seconds: float) -> Outcome:
    return Outcome(
        statuses=Counter(job.status.value for job in world.jobs),
        attempts=sum(len(attempts) for attempts in world.attempts.values()),
        kills=Counter(what for _, what in house.kills),
        manifests={job.labels["key"]: (job.result or {})["manifest_sha256"] for job in world.jobs if job.result},
        seconds=seconds,
    )
