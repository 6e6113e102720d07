"""The two errands around a run, each in a process that can be stopped at any moment: fetch model and texts, store the artifact.

``python -m worker.errand fetch|store``, started by ``worker.process``. Unlike the child that runs the library, an
errand has the service's settings, tokens included, and never looks into a tensor.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from compression.errors import SlimtrimError
from compression.request import Compression
from jobs.logs import configure_logs
from jobs.settings import Settings, load_settings
from jobs.sources import check_text_sources, fetch, fetch_texts
from jobs.storage import KnownObject, known_among, open_storage
from worker.channel import Channel, open_channel
from worker.faults import as_ours

_log = logging.getLogger("worker.errand")


def main(arguments: Sequence[str]) -> int:
    """Run the errand that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("errand", choices=("fetch", "store"))
    options, channel = open_channel(parser, arguments)
    configure_logs(**channel.work.get("log", {}))
    errands = {"fetch": _fetch, "store": _store}
    try:
        errands[options.errand](channel, load_settings())
    except SlimtrimError as error:
        channel.say_error(error)
    except Exception as error:  # the worker must hear a code, whatever happened
        _log.exception("the errand failed")
        channel.say_error(as_ours(error))
    return 0


def _fetch(channel: Channel, settings: Settings) -> None:
    work = channel.work
    known = {name: value for name, value in work["request"].items() if name in Compression.model_fields}
    request = Compression.model_validate(known)
    # Checked when the job was made, and again now: a link may have been turned since.
    check_text_sources(request, settings)
    folder = fetch(request.model, request.revision, Path(work["destination"]), settings)
    texts = fetch_texts(request, Path(work["texts"]), settings)
    if not request.model.startswith("file://"):
        fetched = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        channel.say({"type": "figures", "bytes_fetched": fetched})
    channel.say_result(folder=str(folder), texts={source: str(copy) for source, copy in texts.items()})


def _store(channel: Channel, settings: Settings) -> None:
    folder = Path(channel.work["folder"])
    known = known_among(folder, [KnownObject(**known) for known in channel.work["known"]])
    manifest = open_storage(settings).put_artifact(channel.work["prefix"], folder, known)
    channel.say({"type": "figures", "bytes_stored": manifest["bytes"] - sum(stored.bytes for stored in known.values())})
    channel.say_result(manifest=manifest)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
