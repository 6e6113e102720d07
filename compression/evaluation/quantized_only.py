"""The artifact's recipe without its trims, made in a folder that goes away: what the trims alone have cost."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compression.checkpoint.reader import Model, Reader
from compression.plan import make_plan
from compression.progress import BlockDone, Event, Progress
from compression.recipe import Analyze, Prune, Quantize, Recipe
from compression.sweep import OnBlock

if TYPE_CHECKING:
    from compression.pipeline import Run

_SPARE = 2**28
"""Bytes that stay free on the disk."""


class NoRoom(Exception):
    """The disk has no room for it."""


def is_asked_for(run: Run) -> bool:
    """Say whether the request asks for it and the recipe both trims and quantizes."""
    trims = [step for step in run.steps if not isinstance(step, Analyze | Prune | Quantize)]
    return run.request.evaluation.baselines and bool(trims) and run.quantize is not None


@contextmanager
def made(run: Run, on_block: OnBlock) -> Generator[tuple[Model, int]]:
    """Yield the model and the bytes of its tensors; NoRoom where the disk does not hold it."""
    steps = tuple(step for step in run.steps if isinstance(step, Prune | Quantize))
    request = run.request.model_copy(update={"recipe": Recipe(steps=steps), "target_memory": None})
    plan = make_plan(request, run.reader.checkpoint)
    free = shutil.disk_usage(run.out.parent).free
    if free < plan.bytes_after + _SPARE:
        raise NoRoom(f"it needs {plan.bytes_after} bytes and {_SPARE} to spare on the disk, where {free} are free")
    with tempfile.TemporaryDirectory(prefix="quantized-only-", dir=run.out.parent) as folder:
        twin = replace(run, request=request, out=Path(folder), studies=None, shelf=None, study=None, warnings=[], seconds={})
        twin.inventory, twin.calibration, twin.evaluation = run.inventory, run.calibration, run.evaluation
        twin.progress = Progress(_Passing(on_block), {"compressing": 1})
        twin.follow(plan)
        try:
            twin.study_model()
            twin.choose()
            twin.compress_blocks()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(f"the disk became full while it was made: {error.strerror}") from error
            raise
        yield Reader(Path(folder)), twin.bytes_after


class _Passing:
    """A listener that passes blocks on as a part of the stage in which it is made."""

    def __init__(self, on_block: OnBlock) -> None:
        self._on_block = on_block

    def on_event(self, event: Event) -> None:
        if isinstance(event, BlockDone):
            self._on_block(event.block, event.blocks, f"quantized only: {event.message}")

    def should_stop(self) -> bool:
        return False  # asked by those who listen to on_block
