"""The process that alone imports torch: runs the library on one job and says what happens.

``python -m worker.child --run compression.pipeline:compress``, started by ``worker.process``. Fresh for every job, so
that its memory goes back, and so that a crash, a cancel or the end of its worker ends it and nothing else.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from compression.errors import SlimtrimError, Stopped
from compression.progress import Event, event_to_dict
from compression.request import Compression
from compression.shelf import Files
from compression.text.documents import text_copies
from jobs.logs import configure_logs
from worker.channel import Channel, open_channel
from worker.faults import as_ours

COMPRESS = "compression.pipeline:compress"

_log = logging.getLogger("worker.child")


class _Listener:
    """The library's listener: events go out at once, and "stop" is asked of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def on_event(self, event: Event) -> None:
        self._channel.say(event_to_dict(event))

    def should_stop(self) -> bool:
        return self._channel.should_stop


class _Shelf:
    """The library's shelf: what is finished goes to the worker, and what there is comes from it."""

    def __init__(self, channel: Channel, folder: Path) -> None:
        self._channel = channel
        self.folder = folder

    def find(self, fingerprint: str) -> Mapping[str, Files]:
        answer = self._channel.ask({"type": "find", "fingerprint": fingerprint})
        if (error := answer.get("error")) is not None:
            raise _Named(error)
        return {name: {file: Path(path) for file, path in files.items()} for name, files in answer["found"].items()}

    def keep(self, fingerprint: str, name: str, files: Files) -> None:
        paths = {file: str(path) for file, path in files.items()}
        self._channel.say({"type": "keep", "fingerprint": fingerprint, "name": name, "files": paths})


class _Named(SlimtrimError):
    """The worker named what went wrong."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"])
        self.code, self.retryable = error["code"], error["retryable"]


def main(arguments: Sequence[str]) -> int:
    """Do the one piece of work that standard input describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default=COMPRESS, help="module:function to run, with the signature of compress")
    options, channel = open_channel(parser, arguments)
    channel.stop_on_sigterm()
    faulthandler.enable()
    configure_logs(**channel.work.get("log", {}))
    try:
        report = _compress(_entry(options.run), channel)
    except Stopped:
        channel.say({"type": "stopped"})
    except Exception as error:  # the worker must hear a code, whatever happened
        _log.exception("the run failed")
        channel.say({"type": "figures", **memory_peaks()})
        channel.say_error(as_ours(error))
    else:
        channel.say({"type": "figures", **memory_peaks()})
        channel.say_result(result=report.result(), report=report.model_dump(mode="json"))
    return 0


def memory_peaks() -> dict[str, int]:
    """Return the most memory that this process has used, of its own and of its GPU, in bytes."""
    peaks = {"host_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")  # a run that never needed it is not made to load it now
    if torch is not None and torch.cuda.is_initialized():
        peaks["gpu_memory_peak"] = torch.cuda.max_memory_reserved()
    return peaks


def _compress(compress: Callable[..., Any], channel: Channel) -> Any:
    work = channel.work
    # The row's request has members that are the service's business, such as limits and labels.
    known = {name: value for name, value in work["request"].items() if name in Compression.model_fields}
    request = Compression.model_validate(known)
    planned = _memory_to_plan_with(work.get("host_memory", 0))
    folders = Path(work["model"]), Path(work["out"])
    tasks = work.get("tasks")
    kept = {
        "studies": Path(work["studies"]),
        "shelf": _Shelf(channel, Path(work["parts"])),
        "tasks": Path(tasks) if tasks else None,
    }
    with text_copies({source: Path(copy) for source, copy in work["texts"].items()}):
        return compress(request, *folders, _Listener(channel), **kept, host_memory=planned)


def _memory_to_plan_with(limit: int) -> int | None:
    """Return the bytes that the run may plan with: never more than is free, whatever the limit; None leaves it to the run."""
    return min(limit, psutil.virtual_memory().available) if limit else None


def _entry(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
