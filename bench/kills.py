"""SIGKILLs over jobs of the real library on production parts: every job must end, and with the bytes of one left in peace.

    OMP_NUM_THREADS=1 python -m bench.kills [--jobs 30] [--kills 60] [--seed 1] [--gap 8] [--faults kills|redis|postgres|s3]

PostgreSQL, Redis, SeaweedFS, API, maintenance and two workers, each a process. Each kind of job is first run once by itself;
its manifest's hash, which covers every byte of the artifact, is what the others must show. Then the jobs are posted and members
are killed at random moments: workers, the processes of their jobs, the API. ``redis`` and ``postgres`` restart that server as
often instead, without a warning; ``s3`` answers 503 to a third of all requests. In the end the history is checked against the
promises (``tests/faults/history.py``): nothing run twice at once, no orphan left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.bad_proxy import Faults, a_bad_proxy
from tests.faults.house import House, Parts, a_house
from tests.faults.trial import Fault, Outcome, kill, restart_postgres, restart_redis, trial
from tests.servers import a_postgres, a_redis, an_s3
from worker.child import COMPRESS

WORDS = "the expert the router chose was not the one that the other tokens had wanted so they went home "
RECIPES: list[list[dict[str, Any]]] = [
    [{"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 32}],
    [
        {"step": "expert_drop", "criterion": "reap", "experts_kept": 4},
        {"step": "quantize", "method": "gptq", "scheme": "W8A16", "group_size": 32, "propagate_error": False},
    ],
    [{"step": "prune", "method": "sparsegpt", "sparsity": 0.5}],
]
KINDS: dict[str, Fault] = {"kills": kill, "redis": restart_redis, "postgres": restart_postgres}
_CALLERS = 5


def main() -> int:
    """Run it and print what came of it; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gap", type=float, default=8.0, help="seconds between two faults at most")
    parser.add_argument("--faults", choices=[*KINDS, "s3"], default="kills")
    given = parser.parse_args()
    with ExitStack() as stack:
        parts = Parts(stack.enter_context(a_postgres()), stack.enter_context(a_redis()), stack.enter_context(an_s3()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proxy = stack.enter_context(a_bad_proxy(int(parts.s3.endpoint.rpartition(":")[2]), http=True))
        endpoint = proxy.url if given.faults == "s3" else None
        house = stack.enter_context(a_house(folder, parts, entry=COMPRESS, s3_endpoint=endpoint, MODEL_ROOTS=folder))
        model = tiny_models.build("mixtral", folder / "mixtral", dtype="bfloat16", num_hidden_layers=6)
        alone = trial(house, [[a_body(model, kind) for kind in range(len(RECIPES))]], [], seed=0, gap_s=(0.0, 0.0))
        wanted = [alone.manifests[f"0-{kind}"] for kind in range(len(RECIPES))]
        house.kills.clear()
        if given.faults == "s3":
            proxy.faults = Faults(refuse=1 / 3)
        outcome = trial(
            house, shares(model, given.jobs), [KINDS.get(given.faults, kill)] * (given.kills if given.faults != "s3" else 0),
            seed=given.seed, gap_s=(1.0, given.gap), first=1, patience_s=7200.0,
        )  # fmt: skip
        return told(outcome, given, wanted, house, proxy.refused)


def a_body(model: Path, kind: int) -> dict[str, Any]:
    """Return a request of one kind."""
    return {
        "model": model.as_uri(),
        "recipe": {"steps": RECIPES[kind]},
        "calibration": {"source": {"inline": [WORDS * 40]}, "samples": 16, "sequence_length": 64},
        "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
        "limits": {"max_attempts": 50},
    }


def shares(model: Path, jobs: int) -> list[list[dict[str, Any]]]:
    """Deal the jobs out to the callers, kinds in turn."""
    dealt: list[list[dict[str, Any]]] = [[] for _ in range(_CALLERS)]
    for number in range(jobs):
        dealt[number % _CALLERS].append(a_body(model, number % len(RECIPES)))
    return dealt


def told(outcome: Outcome, given: argparse.Namespace, wanted: list[str], house: House, refused: int) -> int:
    """Print the figures, and say whether every artifact is the one that an undisturbed job made."""
    kinds = {f"{1 + number % _CALLERS}-{number // _CALLERS}": number % len(RECIPES) for number in range(given.jobs)}
    others = [key for key, kind in kinds.items() if outcome.manifests.get(key) != wanted[kind]]
    struck = Counter(member.split("-")[0] for member, _ in house.kills)
    print(f"{given.jobs} jobs, faults {given.faults}, seed {given.seed}: {dict(outcome.statuses)} in {outcome.seconds:.0f} s")
    print(f"attempts {outcome.attempts}; kills {sum(struck.values())}: {dict(struck)}, while {dict(outcome.kills)}")
    print(f"restarts of Redis {house.parts.redis.server.starts - 1}, of PostgreSQL {house.parts.postgres.server.starts - 1}")
    if given.faults == "s3":
        print(f"requests to the bucket answered 503: {refused}")
    print(f"artifacts whose every byte is that of an undisturbed run: {len(kinds) - len(others)} of {len(kinds)}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
