"""Our side of bench.against_llm_compressor: one run from folder to closed artifact, in a process of its own.

    python -m bench.peers.slimtrim_whole REQUEST.json

Goes through ``compress()`` and takes the time when it announces the stage after writing: measuring quality and verifying
are not part of the comparison, since the peer does neither. The tokens are read from the text within that time; they are
compared with those that the peer is given. Prints JSON on the last line.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

_AFTER_WRITING = ("evaluating", "verifying")


def main() -> None:
    """Compress as the request file asks and print what it took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(json.dumps(whole(json.loads(Path(sys.argv[1]).read_text()))) + "\n")


def whole(request: dict[str, Any]) -> dict[str, Any]:
    """Compress one checkpoint; return what it took."""
    start = time.perf_counter()
    import torch
    from safetensors.torch import load_file

    from compression.calibration import load_calibration
    from compression.errors import Stopped
    from compression.pipeline import compress
    from compression.request import Compression

    asked = Compression.model_validate(request["compression"])
    clock = Clock(time.perf_counter(), time.process_time())
    with contextlib.suppress(Stopped):
        compress(asked, Path(request["model"]), Path(request["out"]), clock)
    same = load_file(request["ids"])["ids_NS"].equal(load_calibration(asked.calibration, Path(request["model"])).ids_NS)
    assert same, "the two sides are calibrated on different tokens"
    assert clock.stages, "the run announced no stage after writing"
    return {
        "import_seconds": clock.start - start,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "peak_bytes": clock.peak_bytes,
        "threads": torch.get_num_threads(),
    }


class Clock:
    """A listener that stops the run after the artifact is closed, and knows what it took until then."""

    def __init__(self, start: float, processor_start: float) -> None:
        self.start, self._processor_start = start, processor_start
        self.stages: list[str] = []

    def on_event(self, event: Any) -> None:
        """Take the time at the first stage after writing."""
        if event.type == "stage" and event.stage in _AFTER_WRITING:
            if not self.stages:
                self.seconds = time.perf_counter() - self.start
                self.processor_seconds = time.process_time() - self._processor_start
                self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.stages.append(event.stage)

    def should_stop(self) -> bool:
        """Stop once the time is taken."""
        return bool(self.stages)


if __name__ == "__main__":
    main()
