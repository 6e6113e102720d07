"""Ten SIGKILLs of a worker over five jobs, two workers alive: five results, each committed once, no two leases at a time.

The library is a stand-in, whose moments chance can choose; three kills meet the real one. ``bench.kills`` does that by the dozen.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.status import JobStatus
from jobs.tables import Job
from tests.worker.stand import FAKE, Stand, a_stand
from worker.child import COMPRESS
from worker.maintenance import Maintenance

WORKERS = 2
SPARE_ATTEMPTS = 5
"""Beside one for each kill, so that a lease lost on a busy machine does not use up a job's attempts."""


@dataclass
class Kill:
    """One SIGKILL, and what the row said before it and after the process was gone."""

    job_id: str
    fence: int
    worker: str
    stage: str | None
    others_alive: int


@dataclass
class Crew:
    """Two workers, replaced when they are killed."""

    stand: Stand
    entry: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    hired: int = 0

    def hire(self) -> None:
        self.hired += 1
        name = f"worker-{self.hired}"
        self.processes[name] = self.stand.start_worker(name, self.entry)

    def kill(self, job: Job) -> Kill | None:
        """Kill the worker that holds the job; None when the attempt was over before the process was."""
        assert job.worker is not None
        process = self.processes.pop(job.worker)
        others = sum(other.poll() is None for other in self.processes.values())
        process.kill()
        process.wait()
        self.hire()
        now = self.stand.job(job.id)
        still_held = now.status == JobStatus.RUNNING and now.fence == job.fence
        return Kill(job.id, job.fence, job.worker, now.stage, others) if still_held else None


@pytest.mark.slow
def test_ten_kills_over_five_jobs_lose_nothing_and_double_nothing(parts: dict[str, str], tmp_path: Path):
    with a_stand(tmp_path, LEASE_S=2, HEARTBEAT_S=0.3, **parts) as stand:
        _survive(stand, FAKE, _fake_request(stand), jobs=5, count=10)


@pytest.mark.slow
def test_the_real_library_survives_kills_too(production: dict[str, str], tmp_path: Path, tiny_model_factory: Callable[..., Path]):
    with a_stand(tmp_path, LEASE_S=2, HEARTBEAT_S=0.3, **production) as stand:
        _survive(stand, COMPRESS, _real_request(stand, tiny_model_factory), jobs=2, count=3)


def _survive(stand: Stand, entry: str, body: dict[str, object], *, jobs: int, count: int) -> None:
    ids = [stand.post_request(body, max_attempts=count + SPARE_ATTEMPTS) for _ in range(jobs)]
    stand.start("worker.maintenance")
    crew = Crew(stand, entry)
    for _ in range(WORKERS):
        crew.hire()

    kills = _kills(stand, crew, ids, count)
    over = [stand.wait_over(job_id, timeout_s=600) for job_id in ids]

    assert [job.status for job in over] == [JobStatus.SUCCEEDED] * jobs
    assert len({(kill.job_id, kill.fence) for kill in kills}) == count
    _check_that_every_kill_hit_a_claimed_and_unfinished_attempt(stand, kills)
    _check_that_no_two_leases_overlapped(stand, ids)
    _check_that_each_result_was_committed_once(stand, over)


def _kills(stand: Stand, crew: Crew, ids: list[str], count: int) -> list[Kill]:
    chance = random.Random(7)
    thresholds: dict[tuple[str, int], float] = {}
    kills = list[Kill]()

    def victim() -> Job | None:
        """A running job whose present attempt has come as far as chance decided; 0.0: just claimed, 0.97: storing."""
        for job in map(stand.job, ids):
            if job.status == JobStatus.RUNNING and job.worker in crew.processes:
                threshold = thresholds.setdefault((job.id, job.fence), chance.choice([0.0, 0.02, 0.3, 0.6, 0.9, 0.97]))
                if job.fraction >= threshold:
                    return job
        return None

    while len(kills) < count:
        if kill := crew.kill(stand.wait(victim, f"a victim after {len(kills)} kills", timeout_s=300)):
            kills.append(kill)
    return kills


def _check_that_every_kill_hit_a_claimed_and_unfinished_attempt(stand: Stand, kills: list[Kill]) -> None:
    assert {kill.others_alive for kill in kills} == {WORKERS - 1}
    for kill in kills:
        attempt = next(row for row in stand.attempts(kill.job_id) if row.fence == kill.fence)
        assert (attempt.worker, attempt.outcome, attempt.code) == (kill.worker, "lost", "worker_lost")
        kinds = [(event.type, event.data.get("attempt")) for event in stand.events(kill.job_id)]
        begun, ended = kinds.index(("job.started", attempt.attempt)), kinds.index(("job.attempt_failed", attempt.attempt))
        assert begun < ended < kinds.index(("job.succeeded", stand.job(kill.job_id).attempt))


def _check_that_no_two_leases_overlapped(stand: Stand, ids: list[str]) -> None:
    for job_id in ids:
        attempts = stand.attempts(job_id)
        assert [row.fence for row in attempts] == list(range(1, len(attempts) + 1))
        for before, after in pairwise(attempts):
            assert before.lease_until < after.started_at
            assert before.ended_at is not None
            assert before.ended_at <= after.started_at


def _check_that_each_result_was_committed_once(stand: Stand, jobs: list[Job]) -> None:
    Maintenance(stand.settings).clean()
    for job in jobs:
        assert [row.outcome for row in stand.attempts(job.id)].count("succeeded") == 1
        assert len(stand.events(job.id, "job.succeeded")) == 1
        events = stand.events(job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        manifest = json.loads((stand.settings.objects_folder / f"{job.artifact_prefix}manifest.json").read_bytes())
        stored = {f"{job.artifact_prefix}{file['path']}" for file in manifest["files"]} | {f"{job.artifact_prefix}manifest.json"}
        assert set(stand.stored(job.id)) == stored
        assert job.artifact_prefix == f"artifacts/{job.id}/a{job.fence}/"


def _fake_request(stand: Stand) -> dict[str, object]:
    plan = json.dumps({"blocks": 20, "block_s": 0.05})
    return {
        "model": f"file://{stand.model}",
        "recipe": {"steps": [{"step": "analyze"}]},
        "calibration": {"source": {"inline": [plan]}},
    }


def _real_request(stand: Stand, tiny_model_factory: Callable[..., Path]) -> dict[str, object]:
    model = tiny_model_factory("mixtral", dtype="bfloat16")
    stand.environment["SLIMTRIM_MODEL_ROOTS"] = str(model.parent)
    words = " ".join(f"word{number % 97} and some more text" for number in range(2000))
    held_out = " ".join(f"another{number % 89} sentence for measuring" for number in range(2000))
    return {
        "model": f"file://{model}",
        "recipe": {"steps": [{"step": "quantize", "method": "rtn", "scheme": "W8A16", "group_size": 32}]},
        "calibration": {"source": {"inline": [words]}, "samples": 8, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [held_out]}, "samples": 4}},
    }
