"""What keeping finished blocks costs a run that is not interrupted, and what taking them spares one that was.

    OMP_NUM_THREADS=1 python -m bench.resume [--blocks 8] [--width 512] [--rounds 3]

GPTQ to 4 bits on a random mixture. Three ways, in turn, medians over the rounds: without a shelf; with one, in a folder; and
with one on which all blocks lie but the last, which is what a worker finds that was killed near the end. Seconds are those of
the stage "compressing"; the whole hash of the weights, which a shelf needs, is in them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path

from compression.errors import Stopped
from compression.pipeline import compress
from compression.progress import BlockDone, Silent
from compression.request import Compression
from compression.shelf import FolderShelf
from tests import tiny_models

WAYS = ("without a shelf", "with a shelf", "all but one block found")


class StopsBefore(Silent):
    """Stops when so many blocks of the compressing stage are finished."""

    def __init__(self, blocks: int) -> None:
        self._left = blocks

    def on_event(self, event: object) -> None:
        """Count the finished blocks."""
        if isinstance(event, BlockDone) and event.stage == "compressing":
            self._left -= 1

    def should_stop(self) -> bool:
        """Say whether enough are finished."""
        return self._left <= 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build(
            "mixtral", Path(folder) / "model", dtype="bfloat16", num_hidden_layers=given.blocks, hidden_size=given.width,
            intermediate_size=2 * given.width,
        )  # fmt: skip
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in WAYS:
                seconds[way].append(measured(way, model, Path(folder) / f"{number}-{WAYS.index(way)}", given.blocks))
    base = statistics.median(seconds[WAYS[0]])
    print(f"{given.blocks} blocks of 8 experts, width {given.width}; seconds of the stage, median of {given.rounds}")
    for way in WAYS:
        print(f"{way:<26}{statistics.median(seconds[way]):8.2f} s{statistics.median(seconds[way]) / base:8.3f} times the first")


def measured(way: str, model: Path, place: Path, blocks: int) -> float:
    """Run one way and return the seconds of the stage "compressing"."""
    words = "the expert the router chose was not the one that the other tokens had wanted so they went home "
    request = Compression.model_validate(
        {
            "model": model.as_uri(),
            "recipe": {"steps": [{"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 128}]},
            "calibration": {"source": {"inline": [words * 400]}, "samples": 64, "sequence_length": 128},
            "evaluation": {"perplexity": {"source": {"inline": [words[::-1] * 8]}, "samples": 2}},
        }
    )
    shelf = None if way == WAYS[0] else FolderShelf(place / "shelf")
    if way == WAYS[2]:
        with contextlib.suppress(Stopped):
            compress(request, model, place / "first", StopsBefore(blocks - 1), shelf=shelf)
    return compress(request, model, place / "out", shelf=shelf).seconds["compressing"]


if __name__ == "__main__":
    main()
