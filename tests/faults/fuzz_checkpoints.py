"""Plans hostile checkpoints by the thousand, on the path that the API uses, and counts what became of them.

    python -m tests.faults.fuzz_checkpoints --cases 10000 --seed 1

A case is sound if it ends in a plan, or in a RequestError whose code the HTTP face knows, within a second of processor
time, and takes no more than 300 MB at its peak, the draft itself not counted. An alarm ends a case that hangs.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from api.errors import CODES, problem_of
from compression.errors import RequestError
from compression.memory import give_back
from compression.plan import make_plan
from compression.planner.milp import import_solver
from compression.request import Compression
from jobs.settings import Settings
from jobs.sources import read_checkpoint_of
from tests.faults.hostile import draw, write

SECONDS, HANGS_AFTER, GROWTH = 1.0, 30, 300 * 10**6
_QUANTIZE = {"step": "quantize"}
RECIPES = (
    {"recipe": {"steps": [_QUANTIZE]}},
    {"recipe": {"steps": [{"step": "analyze"}]}},
    {"recipe": {"steps": [{"step": "quantize", "method": "awq", "attention": "W4A16", "dense": "W8A16"}]}, "profile": "custom"},
    {"recipe": {"steps": [{"step": "expert_drop", "experts_kept": 4}, _QUANTIZE]}, "target_memory": "1GB"},
    {"recipe": {"steps": [{"step": "expert_drop", "fraction_dropped": 0.5, "scope": "global"}]}, "profile": "custom"},
    {
        "recipe": {"steps": [{"step": "block_drop", "blocks_dropped": 1}]},
        "serving": {"context_tokens": 2**31, "batch_size": 2**20},
    },
    {"recipe": {"steps": [{"step": "layer_drop", "layers_dropped": 1}]}},
    {"recipe": {"steps": [{"step": "prune", "pattern": "2:4"}]}, "profile": "custom", "serving": {"tensor_parallel": 4}},
    {"recipe": {"steps": [{"step": "expert_merge", "experts_kept": 4}]}, "target_memory": 10**5},
    {"recipe": {"steps": [{"step": "expert_skip"}]}, "profile": "custom"},
)
AUTO = ({"target_memory": 500_000}, {"target_memory": "1GB", "profile": "custom"}, {"target_memory": 1})


class Hung(BaseException):
    """The alarm went off."""


@dataclass
class Tally:
    """What became of the cases."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])
    slowest: float = 0.0
    slowest_case: str = ""
    grown: int = 0


def run(
    cases: int, seed: int, folder: Path, note: Callable[[str], object] = lambda line: None, *, seconds: float = SECONDS
) -> Tally:
    """Plan so many cases, numbered from ``seed`` on; each is drawn from its own number alone. ``seconds``: what is too slow."""
    settings = Settings(data_dir=folder / "data", model_roots=(folder,))
    import_solver()  # as the service does while it starts
    tally = Tally()
    signal.signal(signal.SIGALRM, _ring)
    for number in range(seed, seed + cases):
        for fault in _one(number, folder / "model", settings, tally, seconds):
            tally.faults.append(fault)
            note(fault)
    return tally


def _one(number: int, folder: Path, settings: Settings, tally: Tally, seconds: float) -> Iterator[str]:
    random = Random(number)
    kind, draft = draw(random)
    write(draft, folder)
    recipe = random.choice(AUTO if random.random() < 0.05 else RECIPES)
    request = Compression.model_validate({"model": f"file://{folder}", **recipe})
    name, before, began = f"case {number} ({kind})", _reset_peak(), time.process_time()
    signal.alarm(HANGS_AFTER)
    try:
        outcome, fault = _outcome(request, settings)
    except Hung:
        outcome, fault = "hung", f"hung for {HANGS_AFTER} s"
    finally:
        signal.alarm(0)
    took, grown = time.process_time() - began, _status("VmHWM") - before
    tally.outcomes[outcome] += 1
    if took > tally.slowest:
        tally.slowest, tally.slowest_case = took, name
    tally.grown = max(tally.grown, grown)
    if took > seconds:
        yield f"{name}: took {took:.1f} s, to end in {outcome}"
    if grown > GROWTH:
        yield f"{name}: took {grown} bytes, to end in {outcome}"
    if fault:
        yield f"{name}: {fault}"


def _outcome(request: Compression, settings: Settings) -> tuple[str, str]:
    """Return the code that the case ended in, and what is wrong with that."""
    try:
        checkpoint, _ = read_checkpoint_of(request.model, request.revision, settings)
        make_plan(request, checkpoint).model_dump_json()
    except RequestError as refusal:
        problem = problem_of(refusal)
        told = json.dumps({"detail": problem.detail, "errors": list(problem.errors), **problem.members}, ensure_ascii=False)
        if CODES[problem.code].status >= 500 and problem.code != "source_unavailable":
            return problem.code, f"the HTTP face has no code for {type(refusal).__name__}"
        try:
            told.encode()
        except UnicodeEncodeError:
            return problem.code, f"the message cannot be sent: {problem.detail[:200]!r}"
        return problem.code, f"a message of {len(told)} characters" if len(told) > 8000 else ""
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"[:300] + "\n" + "".join(traceback.format_exc(limit=-4))
    return "planned", ""


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise Hung


def _reset_peak() -> int:
    """Forget the highest memory so far and return the present one; what the draft took on the way is given back first."""
    if _status("VmHWM") - _status("VmRSS") > 10**7:
        gc.collect()
        give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def main() -> int:
    """Run the cases that the arguments ask for and print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        tally = run(options.cases, options.seed, Path(folder), lambda line: print(line, flush=True))
    print(f"{options.cases} cases from seed {options.seed}: {dict(tally.outcomes.most_common())}")
    print(f"slowest {tally.slowest:.2f} s ({tally.slowest_case}); the hungriest took {tally.grown / 1e6:.0f} MB")
    print(f"{len(tally.faults)} faults")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
