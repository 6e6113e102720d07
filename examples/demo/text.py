"""The demo's text: what every CPython carries, split by document into a training and a held-out part.

Two sources: the language reference's help topics (``pydoc_data.topics``) and the docstrings of a fixed list of
standard-library modules. Docstrings are read from the source with ``ast``; no listed module is imported, so
nothing here runs code. The topics quote one another at length and modules share docstrings, so each paragraph is
used once: otherwise the held-out part would hold what the training part has shown.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from examples.demo.errors import DemoFailed

_NAMES = """
_collections_abc _pydecimal _pyio _strptime _threading_local abc argparse ast asyncio.base_events asyncio.events
asyncio.futures asyncio.locks asyncio.protocols asyncio.queues asyncio.selector_events asyncio.sslproto
asyncio.staggered asyncio.streams asyncio.tasks asyncio.transports base64 bdb bz2 calendar cmd code codecs codeop
collections compileall concurrent.futures._base concurrent.futures.process configparser contextlib copy csv ctypes
dataclasses dbm difflib dis doctest email._encoded_words email._header_value_parser email._parseaddr
email._policybase email.base64mime email.charset email.feedparser email.generator email.header email.headerregistry
email.message email.parser email.policy email.quoprimime email.utils enum filecmp fileinput fractions ftplib
functools getopt graphlib gzip heapq hmac http.client http.cookiejar http.cookies http.server imaplib
importlib._bootstrap importlib._bootstrap_external importlib.abc importlib.metadata importlib.metadata._functools
importlib.resources.abc importlib.util inspect ipaddress json json.decoder json.encoder locale logging
logging.config logging.handlers lzma mailbox mimetypes multiprocessing.connection multiprocessing.managers
multiprocessing.pool multiprocessing.shared_memory ntpath numbers operator optparse os pdb pickle pickletools
pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue random re
rlcompleter runpy sched selectors shelve shutil site smtplib socket socketserver ssl statistics subprocess symtable
sysconfig tarfile tempfile textwrap threading timeit tokenize trace traceback typing unittest unittest.case
unittest.loader unittest.mock unittest.result urllib.parse urllib.request uuid venv warnings wave weakref
webbrowser wsgiref.handlers wsgiref.headers wsgiref.validate xml.dom.expatbuilder xml.dom.minidom
xml.etree.ElementTree xml.sax._exceptions xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
xmlrpc.server zipfile zipimport
"""
MODULES = tuple(_NAMES.split())
"""Carried by CPython 3.11, 3.12 and 3.13 alike, each with 1 500 characters of docstrings or more."""

_SHORT = 60
"""Characters below which a paragraph is a heading or a phrase rather than a passage."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Document:
    """One help topic, or all docstrings of one module."""

    name: str
    text: str


def documents() -> list[Document]:
    """Return every document, in a fixed order, with no paragraph twice."""
    seen: set[str] = set()
    found = [Document(f"topic {name}", _new_only([topics[name]], seen)) for name in sorted(topics)]
    found += [Document(f"module {name}", _new_only(docstrings(_source_of(name)), seen)) for name in MODULES]
    return [document for document in found if document.text]


def split(found: list[Document], *, heldout_share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Return (training, held-out): whole documents, drawn until the held-out part has its share of characters."""
    order = sorted(found, key=lambda document: document.name)
    random.Random(seed).shuffle(order)
    wanted = heldout_share * sum(len(document.text) for document in order)
    heldout: list[Document] = []
    while sum(len(document.text) for document in heldout) < wanted:
        heldout.append(order.pop())
    return order, heldout


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module's source, the module's own first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def write_jsonl(path: Path, found: Iterable[Document]) -> None:
    """Write one document a line, as calibration and evaluation sources are read."""
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in found), encoding="utf-8")


def _new_only(passages: Iterable[str], seen: set[str]) -> str:
    """Keep the paragraphs not seen before; wrapping and indentation do not make one new, and short ones may recur."""
    kept: list[str] = []
    for paragraph in (part for passage in passages for part in passage.split("\n\n")):
        content = " ".join(paragraph.split())
        if content not in seen:
            kept.append(paragraph.rstrip())
        if len(content) >= _SHORT:
            seen.add(content)
    return "\n\n".join(kept)


def _source_of(module: str) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    inside = root.joinpath(*module.split("."))
    for path in (inside.with_name(inside.name + ".py"), inside / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise DemoFailed(f"this Python carries no source of the standard module {module!r} below {root}; use a full CPython")
