"""Where text comes from: one source -> its documents, one after another, read only as far as they are asked for.

    {"inline": [...]}   one document per string
    file:///....txt     one document; also .jsonl and .json (a JSON object with "text" per line), .parquet (column
                        "text", a document per row); every one but parquet also as .gz
    hub:<dataset>[:config][:split]   the column "text" of a Hugging Face dataset, streamed; split "train" unless named.
                        One name alone is a config if the dataset has one of that name, else a split.
    s3://...            what the service has fetched: a file of the same kinds, given by ``text_copies``
    default             text that every CPython carries: ``pydoc_data.topics`` for calibration, the docstrings of
                        EVALUATION_MODULES for evaluation. The modules are parsed, never imported.

A document comes as pieces, so that a file of many gigabytes need not be read whole. Pieces end after a line, at
the same places whatever the source, and blank documents are left out: the same documents give the same pieces.
"""

from __future__ import annotations

import ast
import gzip
import json
import platform
import sysconfig
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, cast
from urllib.parse import unquote

from compression.errors import NotAvailable, RequestError, ValidationFailed
from compression.request import InlineText
from compression.text.records import text_of

PIECE = 2**18
"""Characters: a longer document comes in several pieces."""
_LONGEST_LINE = 2**25
"""Bytes of a line of JSON: it is held whole, and a gzip file of a megabyte can hold a line of a gigabyte."""
EVALUATION_MODULES = (
    "argparse", "ast", "asyncio/events", "configparser", "contextlib", "difflib", "email/message", "enum", "fileinput",
    "fractions", "ftplib", "http/cookiejar", "http/server", "imaplib", "inspect", "ipaddress", "json/__init__",
    "logging/__init__", "mailbox", "mimetypes", "optparse", "pickletools", "platform", "random", "shutil", "smtplib",
    "socket", "socketserver", "ssl", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "traceback", "typing", "urllib/request", "uuid", "wave", "xml/etree/ElementTree",
)  # fmt: skip
"""Standard-library files, in every CPython from 3.11 to 3.13, that share no sentence with ``pydoc_data.topics``."""

_COPIES: ContextVar[Mapping[str, Path] | None] = ContextVar("copies", default=None)

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one; ``last`` where the document ends."""

    text: str
    last: bool


@contextmanager
def text_copies(copies: Mapping[str, Path]) -> Generator[None]:
    """Read these sources from files on this machine. The request and the report go on naming where the text came from."""
    token = _COPIES.set(copies)
    try:
        yield
    finally:
        _COPIES.reset(token)


def read_documents(source: str | InlineText, purpose: Purpose, *, pointer: str) -> Iterator[Piece]:
    """Yield the source's documents. Errors name the place in the source and ``pointer``, the place in the request."""
    try:
        for document in _documents(source, purpose):
            yield from _cut(document)
    except RequestError as error:
        error.pointer = error.pointer or pointer
        raise


def describe_source(source: str | InlineText, purpose: Purpose) -> str:
    """Return the source as the report names it; inline text is counted, not repeated."""
    if isinstance(source, InlineText):
        return f"inline ({len(source.inline)} documents)"
    if source != "default":
        return source
    text = "pydoc_data.topics" if purpose == "calibration" else "docstrings of the standard library"
    return f"default ({text}, Python {platform.python_version()})"


def docstrings(module: str) -> str:
    """Return every docstring of a standard-library file, such as "json/__init__", without importing it."""
    path = Path(sysconfig.get_paths()["stdlib"], f"{module}.py")
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise ValidationFailed(f"this Python carries no source of {module}, which default text needs; name a source") from error
    return "\n\n".join(_docstrings_below(tree))


def _documents(source: str | InlineText, purpose: Purpose) -> Iterator[Iterable[str]]:
    if isinstance(source, InlineText):
        return ([text] for text in source.inline)
    if source == "default":
        return ([text] for text in (_topics() if purpose == "calibration" else map(docstrings, EVALUATION_MODULES)))
    if source.startswith("hub:"):
        from compression.text.hub import stream_texts

        return ([text] for text in stream_texts(source))
    return _file_documents(local_file(source))


def _cut(chunks: Iterable[str]) -> Iterator[Piece]:
    buffer, begun = "", False
    for part in (chunk[start : start + PIECE] for chunk in chunks for start in range(0, len(chunk), PIECE)):
        buffer += part
        while len(buffer) > PIECE:
            end = buffer.rfind("\n", 0, PIECE) + 1 or PIECE
            yield Piece(buffer[:end], last=False)
            buffer, begun = buffer[end:], True
    if begun or buffer.strip():
        yield Piece(buffer, last=True)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings_below(child)


def _path_of(source: str) -> Path:
    path = source.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise ValidationFailed(f"{source!r} names no absolute path; write file:///folder/name.txt")
    return Path(unquote(path))


def _file_documents(path: Path) -> Iterator[Iterable[str]]:
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "txt":
            return iter([_text_chunks(path)])
        case "jsonl" | "json":
            return ([text] for text in _json_texts(path))
        case "parquet" if not _is_gzip(path):
            return ([text] for text in _parquet_texts(path))
    raise ValidationFailed(f"{path} is not a kind of text file that is read; use .txt, .jsonl, .json (each also .gz) or .parquet")


def _text_chunks(path: Path) -> Iterator[str]:
    # newline="": line ends stay as they are, so that a file and the same text inline give the same tokens.
    with _named_errors(path), _opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        while chunk := text.read(PIECE):
            yield chunk


def _json_texts(path: Path) -> Iterator[str]:
    return (text_of(record, place) for record, place in json_records(path))


def json_records(path: Path) -> Iterator[tuple[object, str]]:
    """Yield each line of a file of JSON lines, and its place for errors."""
    with _named_errors(path), _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            if len(line) > _LONGEST_LINE:
                raise ValidationFailed(f"line {number} of {path} is longer than {_LONGEST_LINE} bytes; split the document")
            if line.strip():
                place = f"line {number} of {path}"
                yield _json_record(line, place), place


def _json_record(line: bytes, place: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValidationFailed(f"{place} is not JSON: {error}") from error


def local_file(source: str) -> Path:
    """Return the file on this machine that a ``file://`` or ``s3://`` source is read from."""
    if source.startswith("file://"):
        return _path_of(source)
    if (copy := (_COPIES.get() or {}).get(source)) is not None:
        return copy
    raise NotAvailable(f"{source!r} was not fetched; only the service reads buckets: use file://, hub: or inline text")


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _named_errors(path), parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise ValidationFailed(f'{path} has no column "text"; it has {", ".join(map(repr, names))}')
            batches = (batch.column(0).to_pylist() for batch in file.iter_batches(batch_size=256, columns=["text"]))
            for row, text in enumerate(chain.from_iterable(batches), start=1):
                yield text_of({"text": text}, f"row {row} of {path}")
    except pyarrow.ArrowException as error:
        raise ValidationFailed(f"{path} is not a readable parquet file: {error}") from error


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path)) if _is_gzip(path) else path.open("rb")


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValidationFailed(f"there is no text file {path}") from error
    except UnicodeDecodeError as error:
        raise ValidationFailed(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValidationFailed(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValidationFailed(f"{path} cannot be read: {error.strerror or error}") from error
