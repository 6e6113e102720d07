"""Stand-ins for the library, run by a real worker in a real child process instead of ``compression.pipeline:compress``.

What a stand-in does is written in the request's inline calibration text, as JSON: ``blocks``, ``block_s`` (seconds a
block takes), ``ending``, and ``keeps``: whether finished blocks outlive the attempt. Everything around it - rows, queue,
processes, storage - is the real thing.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from compression.errors import BrokenCheckpoint, DownloadFailed
from compression.progress import Listener, Progress
from compression.request import Compression, InlineText
from compression.shelf import Shelf
from tests.compression.made_reports import full_report

PLAN = {"blocks": 4, "block_s": 0.02, "ending": "success", "keeps": False}


class FakeReport:
    """A made up report that says which run made it: in ``versions``, the folder of the attempt."""

    def __init__(self, request: Compression, fence_folder: str, blocks: int) -> None:
        made = full_report(blocks).model_copy(update={"revision": request.revision, "versions": {"folder": fence_folder}})
        self._data = made.model_dump(mode="json")

    def result(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("retention", "perplexity_before", "perplexity_after", "divergence"))
        return {"bytes_before": 100, "bytes_after": 25, "ratio": 4.0, "verified": True, **unknown}

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return self._data


def compress(
    request: Compression, model: Path, out: Path, listener: Listener, *, studies: Path, shelf: Shelf, host_memory: int | None,
    tasks: Path | None,
) -> FakeReport:  # fmt: skip
    """Pretend to work on some blocks, then end as the request says."""
    assert isinstance(request.calibration.source, InlineText)
    plan = PLAN | json.loads(request.calibration.source.inline[0])
    sys.stdout.write("libraries print, and nobody minds\n")
    progress = Progress(listener, {"studying": 1.0, "compressing": 3.0})
    progress.stage("studying")
    progress.warn("fake", "this is not a real run")
    progress.stage("compressing")
    fingerprint = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    found = shelf.find(fingerprint) if plan["keeps"] else {}
    for block in range(1, plan["blocks"] + 1):
        name, shard = f"block-{block:05d}", out / f"block-{block}.bin"
        if name in found:
            shutil.copyfile(found[name]["shard"], shard)
        else:
            time.sleep(plan["block_s"])
            shard.write_bytes(bytes([block]) * 1000)
            if plan["keeps"]:
                shelf.keep(fingerprint, name, {"shard": shard})
        progress.block(block, plan["blocks"], f"block {block}")
    _end(plan["ending"], host_memory)
    (out / "report.json").write_text("{}")
    return FakeReport(request, out.parent.name, plan["blocks"])


def _end(ending: str, host_memory: int | None) -> None:
    match ending:
        case "success":
            return
        case "segfault":
            ctypes.string_at(0)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "retryable":
            raise DownloadFailed("the file came incomplete")
        case "permanent":
            raise BrokenCheckpoint("the header lies")
        case "unforeseen":
            raise RuntimeError("secret detail")
        case "memory":
            raise MemoryError
        case "told":
            raise BrokenCheckpoint(f"may plan with {host_memory}")
        case "disk":
            raise OSError(28, "No space left on device")
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "environment":
            raise BrokenCheckpoint(json.dumps(sorted(os.environ)))
