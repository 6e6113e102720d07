"""The command line: verbs, options, and the request body that they make."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from slimtrim_client.connection import DEFAULT_URL, KEY_FILE_VARIABLE, KEY_VARIABLE, URL_VARIABLE, __version__
from slimtrim_client.documents import OVER, Body
from slimtrim_client.errors import BadInput

_EXIT_CODES = """exit codes:
  0    done; where a job was waited for, it succeeded
  1    the job failed
  2    wrong usage, or the service refused the request
  3    the job was cancelled, or expired in the queue
  4    the service cannot be reached, or cannot answer now, after some tries
  5    the artifact keeps less than --min-retention
  6    a download is damaged, or its manifest is not to be trusted
  7    the disk is full, or the folder cannot be written
  130  interrupted; a job that was watched goes on
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    top = argparse.ArgumentParser(
        prog="slimtrim",
        description="Speaks with a slimtrim service, which makes Mixture-of-Experts models fit the memory there is.",
        epilog=f"The API key comes from {KEY_VARIABLE} or a file, never from the command line.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --key must not be taken for --key-file
    )
    top.add_argument("--version", action="version", version=f"slimtrim-client {__version__}")
    _common(top, None)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, fill in _VERBS:
        verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        _common(verb, argparse.SUPPRESS)
        fill(verb)
    return top


def body_of(options: argparse.Namespace) -> Body:
    """Return the request: what the file says, then the options, then every ``--set``."""
    body: Body = _json_file(options.request) if options.request else {}
    if options.recipe is not None:
        recipe: Any = "auto" if options.recipe == "auto" else _json_file(options.recipe, kinds=(dict, list))
        body["recipe"] = {"steps": recipe} if isinstance(recipe, list) else recipe
    for path, value in _named(options):
        if value is not None:
            put(body, path, value)
    for name, value in (_pair(each, "--label") for each in options.label):
        put(body, ["labels", name], value)
    for name, value in (_pair(each, "--set") for each in options.set):
        put(body, name.split("."), _value(value))
    if "model" not in body:
        raise BadInput("no model is named; give --model, or a request file that has one")
    return body


def labels_of(pairs: Sequence[str]) -> dict[str, str]:
    """Return labels by name."""
    return dict(_pair(each, "--label") for each in pairs)


def put(body: Body, path: Sequence[str], value: Any) -> None:
    """Set one member, however deep."""
    at = body
    for depth, name in enumerate(path[:-1]):
        inner = at.setdefault(name, {})
        if not isinstance(inner, dict):
            raise BadInput(
                f"{'.'.join(path)} cannot be set: {'.'.join(path[: depth + 1])} is {json.dumps(inner)[:80]}, not an object"
            )
        at = cast(Body, inner)
    at[path[-1]] = value


def _named(options: argparse.Namespace) -> list[tuple[list[str], Any]]:
    """Return the options that stand for one member each."""
    return [
        (["model"], options.model),
        (["revision"], options.revision),
        (["target_memory"], options.target),
        (["profile"], options.profile),
        (["calibration", "source"], options.calibration),
        (["calibration", "samples"], options.samples),
        (["calibration", "sequence_length"], options.sequence_length),
        (["evaluation", "perplexity", "source"], options.evaluation),
        (["evaluation", "benchmarks"], options.benchmark or None),
        (["evaluation", "speed"], options.speed or None),
        (["constraints", "min_retention"], options.min_retention),
        (["constraints", "on_violation"], options.on_violation),
        (["webhook", "url"], options.webhook),
    ]


def _common(at: argparse.ArgumentParser, default: Any) -> None:
    """Options that stand before the verb or behind it."""
    quiet = False if default is None else default
    at.add_argument("--server", metavar="URL", default=default, help=f"the service; default {URL_VARIABLE}, else {DEFAULT_URL}")
    at.add_argument("--key-file", type=Path, metavar="FILE", default=default, help=f"holds the key; default {KEY_FILE_VARIABLE}")
    at.add_argument("--json", action="store_true", default=quiet, help="print documents for programs, nothing for people")


def _request(at: argparse.ArgumentParser) -> None:
    at.add_argument("request", nargs="?", metavar="REQUEST.json", help="the body, or - for standard input; options come on top")
    at.add_argument("--model", help='a hub id, "file:///..." or "s3://..." as the service sees it')
    at.add_argument("--revision", help="of a hub model")
    at.add_argument("--target", metavar="SIZE", help='bytes that weights, cache and overhead may take, as "20GB" or "20GiB"')
    at.add_argument("--recipe", metavar="auto|FILE", help="auto, or a JSON file: a recipe, or its list of steps")
    at.add_argument("--profile", help="portable or custom")
    at.add_argument("--calibration", metavar="SOURCE", help='text to take statistics on, as "hub:NAME" or "file:///..."')
    at.add_argument("--samples", type=int, metavar="N", help="of calibration text")
    at.add_argument("--sequence-length", type=int, metavar="N", help="tokens in each")
    at.add_argument("--evaluation", metavar="SOURCE", help="held-out text to measure perplexity on")
    at.add_argument("--benchmark", action="append", default=[], metavar="NAME", help="may be given more than once")
    at.add_argument("--speed", action="store_true", help="measure speed as well")
    _floor(at)
    at.add_argument("--on-violation", choices=("fail", "report"), help="below --min-retention; default fail")
    at.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help="may be given more than once")
    at.add_argument("--webhook", metavar="URL", help="who is told of the end")
    at.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="any other member, as JSON or plain text")


def _submit(at: argparse.ArgumentParser) -> None:
    _request(at)
    at.add_argument("--wait", action="store_true", help="stay until the job is over; the exit code tells how it ended")
    at.add_argument("--idempotency-key", metavar="KEY", help="the same key and request give the same job; default a new key")


def _watch(at: argparse.ArgumentParser) -> None:
    _job(at)
    at.add_argument("--after", type=int, default=0, metavar="SEQ", help="leave out events up to this number")
    _floor(at)


def _report(at: argparse.ArgumentParser) -> None:
    _job(at)
    at.add_argument("--html", type=Path, metavar="FILE", help="write the report there as a page")
    _floor(at)


def _download(at: argparse.ArgumentParser) -> None:
    _job(at)
    at.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="default: the job's id")
    at.add_argument("--parallel", type=int, default=4, metavar="N", help="files at a time; default 4")


def _list(at: argparse.ArgumentParser) -> None:
    at.add_argument("--status", action="append", default=[], choices=["queued", "running", "cancelling", *sorted(OVER)])
    at.add_argument("--model")
    at.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    at.add_argument("--limit", type=int, default=20, metavar="N", help="most jobs to show; default 20")
    at.add_argument("--after", metavar="CURSOR", help="next_cursor of the page before")


def _job(at: argparse.ArgumentParser) -> None:
    at.add_argument("job", metavar="JOB", help="its id")


def _floor(at: argparse.ArgumentParser) -> None:
    at.add_argument("--min-retention", type=_share, metavar="X", help="0 to 1: exit code 5 if the artifact keeps less")


_VERBS = (
    ("plan", "show what a request would do, to the byte; writes nothing", _request),
    ("submit", "create a job and print its id", _submit),
    ("watch", "follow a job to its end", _watch),
    ("report", "show what was done to the model and what it cost", _report),
    ("download", "fetch the artifact, going on where an earlier download stopped", _download),
    ("cancel", "ask for a job's end", _job),
    ("list", "list jobs, newest first", _list),
    ("retry", "create a job that goes on where a failed or cancelled one ended", _job),
    ("delete", "remove a finished job and its artifact", _job),
)


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return share


def _pair(text: str, option: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise BadInput(f"{option} takes NAME=VALUE, not {text!r}")
    return name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json_file(name: str, kinds: tuple[type, ...] = (dict,)) -> Any:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{name} is not JSON: {error}") from error
    if not isinstance(document, kinds):
        raise BadInput(f"{name} holds no JSON object")
    return document
