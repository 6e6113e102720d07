"""Callers and faults at once on production parts, and no history that breaks a promise. The library is a stand-in here.

``python -m bench.kills`` does the same with the real one, for as many jobs and kills as one likes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.checkpoints import write_mixtral
from tests.bad_proxy import Faults, a_bad_proxy
from tests.faults.broken import broken_worlds, sound
from tests.faults.conftest import Receiver
from tests.faults.history import History, World, check
from tests.faults.house import House, Parts, a_house
from tests.faults.trial import Fault, kill, restart_postgres, restart_redis, trial

SEED = 7
FAULTS: dict[str, list[Fault]] = {
    "kills": [kill] * 8,
    "servers": [restart_redis, restart_postgres, kill, restart_redis, restart_postgres],
}


def a_body(house: House, receiver: Receiver, **plan: Any) -> dict[str, Any]:
    model = house.stand.folder / "models" / "mixtral"
    if not model.exists():
        write_mixtral(model)
    return {
        "model": f"file://{model}",
        "recipe": {"steps": [{"step": "quantize"}]},
        "calibration": {"source": {"inline": [json.dumps({"blocks": 6, "block_s": 0.2, "keeps": True, **plan})]}},
        "limits": {"max_attempts": 20},
        "webhook": {"url": f"http://127.0.0.1:{receiver.port}/told", "events": ["job.succeeded", "job.cancelled", "job.failed"]},
    }


@pytest.mark.slow
@pytest.mark.parametrize("faults", FAULTS)
def test_no_history_breaks_a_promise(faults: str, tmp_path: Path, parts: Parts, receiver: Receiver):
    with a_house(tmp_path, parts, WEBHOOK_HOSTS=f"127.0.0.1:{receiver.port}") as house:
        bodies = [[a_body(house, receiver, number=2 * caller + place) for place in range(2)] for caller in range(4)]

        outcome = trial(house, bodies, FAULTS[faults], seed=SEED, gap_s=(0.5, 2.5), cancels=0.25, told=receiver.told)

    assert set(outcome.statuses) <= {"succeeded", "cancelled"}
    assert outcome.statuses["succeeded"] > 0
    assert outcome.statuses.total() == 8


@pytest.mark.slow
def test_a_bucket_that_refuses_a_third_of_all_requests_costs_time_alone(tmp_path: Path, parts: Parts, receiver: Receiver):
    with a_bad_proxy(int(parts.s3.endpoint.rpartition(":")[2]), http=True) as proxy:
        proxy.faults = Faults(refuse=1 / 3)
        with a_house(tmp_path, parts, s3_endpoint=proxy.url, WEBHOOK_HOSTS=f"127.0.0.1:{receiver.port}") as house:
            outcome = trial(
                house,
                [[a_body(house, receiver)], [a_body(house, receiver, number=1)]],
                [],
                seed=SEED,
                gap_s=(0, 0),
                told=receiver.told,
            )

        assert outcome.statuses == {"succeeded": 2}
        assert proxy.refused > 0


def test_the_checker_finds_what_a_broken_service_would_do():
    """A checker that finds nothing proves nothing: each rule is shown a history that breaks it."""
    check(*sound())
    passed = [name for name, (history, world, rule) in broken_worlds().items() if not _is_found(history, world, rule)]

    assert passed == []


def _is_found(history: History, world: World, rule: str) -> bool:
    try:
        check(history, world)
    except AssertionError as error:
        return rule in str(error)
    return False
