"""Everything that is measured of original and artifact, in order: perplexity, benchmarks, generation, speed.

Perplexity goes block by block and always runs. The rest opens each model whole, one at a time and each in a process of
its own, original first; where the original does not fit into the memory of this run, that is said and nothing is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import psutil
import torch

from compression.checkpoint.reader import Model, Reader
from compression.checkpoint.source import open_source
from compression.evaluation.benchmarks import command_line, hash_of, rows_of
from compression.evaluation.generation import compared
from compression.evaluation.opened import device_of_run, needs_own_loader
from compression.evaluation.perplexity import Beside, measure
from compression.evaluation.process import run_child
from compression.evaluation.quantized_only import NoRoom, is_asked_for, made
from compression.evaluation.speed import point
from compression.measured import Benchmarks, Generation, NotMeasured, Quality, Speed
from compression.methods import at_random, choose_cuts
from compression.recipe import ExpertDrop, ExpertMerge
from compression.sweep import OnBlock
from compression.text.prompts import read_prompts

if TYPE_CHECKING:
    from compression.pipeline import Run

_LOTS_SEED = 0
_OF_A_PROCESS = 2**30
"""Bytes that a process with torch and transformers in it needs besides the model."""
_Side = Literal["original", "artifact"]
_SIDES: tuple[_Side, ...] = get_args(_Side)


@dataclass(frozen=True)
class Measured:
    """What the report holds of it."""

    quality: Quality
    benchmarks: Benchmarks | None
    generation: Generation | None
    speed: Speed | None


def prepare(run: Run) -> None:
    """Refuse what could not be measured anyway, before anything is compressed: unknown tasks, data that cannot be fetched."""
    settings = run.request.evaluation
    if settings.generation is not None:
        run.prompts = read_prompts(settings.generation)
    if settings.benchmarks:
        work = {"tasks": settings.benchmarks, "folder": _folder(run)}
        run_child("compression.evaluation.harness", work, check=run.progress.check, on_progress=lambda *_: None)


def evaluate(run: Run) -> Measured:
    """Measure what the request asks for; what cannot be is noted in ``run.not_measured``."""
    settings, parts = run.request.evaluation, _Parts(run.progress.block)
    asked = {"benchmarks": bool(settings.benchmarks), "generation": settings.generation, "speed": settings.speed_settings}
    parts.count = 1 + is_asked_for(run) + sum(2 for part in ("benchmarks", "generation") if asked[part])
    if settings.speed_settings is not None:
        parts.count += 2 * len(settings.speed_settings.batch_sizes)
    quality = _quality(run, parts)
    if any(asked.values()) and (reason := _does_not_fit(run)):
        for part in ("benchmarks", "generation", "speed"):
            if asked[part]:
                note_not_measured(run, NotMeasured(what=part, reason=reason))
        return Measured(quality, None, None, None)
    return Measured(
        quality,
        benchmarks=_benchmarks(run, parts) if asked["benchmarks"] else None,
        generation=_generation(run, parts) if asked["generation"] else None,
        speed=_speed(run, parts) if asked["speed"] else None,
    )


def note_not_measured(run: Run, note: NotMeasured) -> None:
    """Put it into the report, and say it at once."""
    run.not_measured.append(note)
    run.warn("not_measured", f"{note.what}: {note.reason}")


class _Parts:
    """The share of the stage that each part has: all have the same."""

    def __init__(self, on_block: OnBlock) -> None:
        self._on_block = on_block
        self._place = 0
        self.count = 1

    def next(self) -> OnBlock:
        place, self._place = self._place, self._place + 1
        return lambda done, total, text: self._on_block(place * total + done, self.count * total, text)


def _quality(run: Run, parts: _Parts) -> Quality:
    mixture = isinstance(run.request.evaluation.perplexity.source, tuple)
    with ExitStack() as stack:
        quantized: tuple[Model, int] | None = None
        if is_asked_for(run):
            try:
                quantized = stack.enter_context(made(run, parts.next()))
            except NoRoom as error:
                note_not_measured(run, NotMeasured(what="quantized_only", reason=str(error)))
        return measure(
            open_source(run.reader.folder, run.device),
            Reader(run.out),
            run.evaluation.ids_NS,
            device=run.device,
            on_block=parts.next(),
            domains=run.evaluation.domains if mixture else (),
            domain_N=run.evaluation.domain_N if mixture else None,
            beside=Beside(_drawn_by_lot(run), quantized),
        )


def _drawn_by_lot(run: Run) -> tuple[Model, int] | None:
    """Return the original with the same trims, experts drawn by lot; None where no criterion chooses any."""
    chosen = [step for step in run.steps if isinstance(step, ExpertDrop | ExpertMerge)]
    if all(isinstance(step, ExpertDrop) and step.criterion == "random" for step in chosen):
        return None
    steps = tuple(at_random(step, _LOTS_SEED) for step in run.steps)
    return run.trimmed(choose_cuts(steps, run.study, run.whole, run.choice)), _LOTS_SEED


def _does_not_fit(run: Run) -> str | None:
    """Return why the bigger of the two models cannot be opened whole; None where it can."""
    original = sum(header.bytes for header in run.reader.dense.tensors.values())
    needed = _OF_A_PROCESS + max(original, run.plan.memory["transformers"] + run.bytes_after)
    rooms = {"main memory": min(run.host_memory - psutil.Process().memory_info().rss, psutil.virtual_memory().available)}
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        rooms["the accelerator"] = torch.cuda.mem_get_info(run.device)[0]
    for place, room in rooms.items():
        if needed > room:
            return f"opening the bigger model whole needs {needed} bytes and {place} has {max(0, room)} for it"
    return None


def _on_each(run: Run, parts: _Parts, module: str, work: dict[str, Any], what: str) -> dict[_Side, dict[str, Any]]:
    return {side: _child(run, parts.next(), module, work, side, what) for side in _SIDES}


def _child(run: Run, on_block: OnBlock, module: str, work: dict[str, Any], side: _Side, what: str) -> dict[str, Any]:
    folder = run.reader.folder if side == "original" else run.out
    text = f"{side}: {what}"
    on_block(0, 1, text)
    tell: Callable[[int, int], None] = _forward_only(lambda done, total: on_block(done, total, f"{text}, {done} of {total}"))
    result = run_child(
        f"compression.evaluation.{module}",
        {**work, "model": str(folder.resolve())},
        check=run.progress.check,
        on_progress=tell,
    )
    on_block(1, 1, text)
    return result


def _forward_only(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Leave out what would take the bar back: the harness begins to count anew with every kind of request."""
    most = 0.0

    def onward(done: int, total: int) -> None:
        nonlocal most
        if done / total > most:
            most = done / total
            tell(done, total)

    return onward


def _folder(run: Run) -> str | None:
    return None if run.tasks is None else str(run.tasks.resolve())


def _benchmarks(run: Run, parts: _Parts) -> Benchmarks:
    settings = run.request.evaluation
    sizes: dict[str, Any] = {"batch_size": settings.batch_size, "limit": settings.benchmark_limit}
    work = {"tasks": settings.benchmarks, "folder": _folder(run), **sizes}
    found = _on_each(run, parts, "harness", work, f"benchmarks {', '.join(settings.benchmarks)}")
    return Benchmarks(
        rows=rows_of(found["original"]["rows"], found["artifact"]["rows"]),
        harness=found["artifact"]["harness"],
        tasks_hash=None if run.tasks is None else hash_of(run.tasks),
        command=command_line(
            settings.benchmarks,
            **sizes,
            device=device_of_run().type,
            own_loader=needs_own_loader(run.out),
            own_tasks=run.tasks is not None,
        ),
        **sizes,
    )


def _generation(run: Run, parts: _Parts) -> Generation:
    settings = run.request.evaluation
    assert settings.generation is not None, "asked for"
    assert run.prompts is not None, "read at the beginning"
    prompts, source = run.prompts
    work = {
        "prompts": [prompt.prompt for prompt in prompts],
        "new_tokens": settings.generation.new_tokens,
        "batch_size": settings.batch_size,
    }
    found = _on_each(run, parts, "writing", work, f"{len(prompts)} prompts")
    return compared(settings.generation, prompts, found["original"], found["artifact"], source)


def _speed(run: Run, parts: _Parts) -> Speed:
    settings = run.request.evaluation.speed_settings
    assert settings is not None, "asked for"
    points, timed = [], dict[str, Any]()
    for batch_size in settings.batch_sizes:
        work = {**settings.model_dump(exclude={"batch_sizes"}), "batch_size": batch_size}
        for side in _SIDES:
            timed = _child(run, parts.next(), "timing", work, side, f"speed at batch size {batch_size}")
            points.append(point(side, batch_size, settings, timed))
    return Speed(**{name: timed[name] for name in ("engine", "device", "threads", "dtype")}, points=tuple(points))
