"""Sources give documents: whole, in order, the same whatever they are stored in, and no further than asked."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from compression.errors import NotAvailable, ValidationFailed
from compression.request import InlineText
from compression.text.documents import EVALUATION_MODULES, PIECE, Piece, describe_source, docstrings, read_documents, text_copies

DOCUMENTS = ("First.\nTwo lines.\r\n", "Second, with ünïcode — and a tab\t.", "Third")
POINTER = "/calibration/source"


def _read(source: str | InlineText) -> list[Piece]:
    return list(read_documents(source, "calibration", pointer=POINTER))


def _jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS))


def _gzipped_jsonl(path: Path) -> None:
    path.write_bytes(gzip.compress("\n\n".join(json.dumps({"text": text}) for text in DOCUMENTS).encode()))


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": DOCUMENTS}), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": _jsonl,
    "b.JSON": _jsonl,
    "c.00001-of-00002.json.gz": _gzipped_jsonl,
    "d.jsonl.gz": _gzipped_jsonl,
    "e.parquet": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_several_documents_give_what_the_same_inline_text_gives(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)

    pieces = _read(f"file://{tmp_path / name}")

    assert pieces == _read(InlineText(inline=DOCUMENTS)) == [Piece(text, last=True) for text in DOCUMENTS]


@pytest.mark.parametrize("name", ["plain.txt", "packed.txt.gz", "with space.txt"])
def test_a_text_file_is_one_document_line_ends_included(name: str, tmp_path: Path) -> None:
    text = "\n\n".join(DOCUMENTS)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)

    assert _read((tmp_path / name).as_uri()) == [Piece(text, last=True)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "text"}', encoding="utf-8-sig")

    assert _read(f"file://{tmp_path}/a.txt") == _read(f"file://{tmp_path}/b.jsonl") == [Piece("text", last=True)]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n{"text": null}\n{"text": "x"}\n{"text": ""}\n')

    assert _read(f"file://{tmp_path}/a.jsonl") == [Piece("x", last=True)]


@pytest.mark.parametrize("line", ["lines of twenty-one.\n", "no line end anywhere "])
def test_a_long_document_comes_in_pieces_that_end_after_a_line_and_lose_nothing(line: str, tmp_path: Path) -> None:
    text = line * (PIECE * 5 // 2 // len(line))
    (tmp_path / "a.txt").write_text(text)

    pieces = _read(f"file://{tmp_path}/a.txt")

    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False, False, True]
    assert all(piece.text.endswith("\n") for piece in pieces) == line.endswith("\n")
    assert pieces == _read(InlineText(inline=(text,)))


def test_a_long_document_that_ends_in_blanks_still_ends() -> None:
    text = "x" * PIECE + " " * 10

    assert _read(InlineText(inline=(text,))) == [Piece("x" * PIECE, last=False), Piece(" " * 10, last=True)]


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "good"}\nbroken\n')
    documents = read_documents(f"file://{tmp_path}/a.jsonl", "calibration", pointer=POINTER)

    assert [next(documents).text, next(documents).text] == ["good", "good"]
    with pytest.raises(ValidationFailed, match=r"line 3 of .*a\.jsonl is not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2 of .* is not an object"),
        ("a.jsonl", b'{"content": "x"}\n', r"line 1 of .* has no \"text\"; it has 'content'"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 of .*\"text\" is int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 of .* is not valid text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 of .* is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of .* is not JSON"),
        ("a.txt", b"good \xff", r"a\.txt is not UTF-8 text: .* at byte 5"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz is not a whole gzip file"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a readable parquet file"),
        ("a.parquet", b"", r"a\.parquet is not a readable parquet file"),
        ("a.parquet.gz", b"", r"is not a kind of text file"),
        ("a.csv", b"text\nx\n", r"is not a kind of text file"),
        ("a", b"text", r"is not a kind of text file"),
    ],
)
def test_broken_files_are_refused_by_name_and_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValidationFailed, match=message) as caught:
        _read(f"file://{tmp_path}/{name}")

    assert caught.value.pointer == POINTER


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"content": ["x"]}, r"has no column \"text\"; it has 'content'"),
        ({"text": ["x", "y"], "n": [1, 2]}, None),
        ({"text": [1, 2]}, r"row 1 of .*\"text\" is int"),
        ({"text": [b"\xff"]}, r"row 1 of .*\"text\" is bytes"),
    ],
)
def test_a_parquet_file_needs_a_column_of_text(table: dict[str, list[object]], message: str | None, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")

    if message is None:
        assert len(_read(f"file://{tmp_path}/a.parquet")) == 2
        return
    with pytest.raises(ValidationFailed, match=message):
        _read(f"file://{tmp_path}/a.parquet")


def test_a_parquet_file_with_destroyed_pages_is_refused(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    footer = 8 + int.from_bytes(content[-8:-4], "little")
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * (len(content) - footer - 4) + content[-footer:])

    with pytest.raises(ValidationFailed, match=r"a\.parquet"):
        _read(f"file://{tmp_path}/a.parquet")


@pytest.mark.parametrize(
    "source", ["file:///nowhere/at/all.txt", "file:///nowhere/at/all.jsonl", "file:///nowhere/at/all.parquet"]
)
def test_a_missing_file_is_refused(source: str) -> None:
    with pytest.raises(ValidationFailed, match="there is no text file /nowhere/at/all"):
        _read(source)


@pytest.mark.parametrize("name", ["folder.txt", "folder.jsonl", "folder.parquet"])
def test_a_folder_is_no_text_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()

    with pytest.raises(ValidationFailed, match=name):
        _read(f"file://{tmp_path}/{name}")


@pytest.mark.parametrize("source", ["file://relative/a.txt", "file://", "file://localhostile/a.txt"])
def test_a_file_source_names_an_absolute_path(source: str) -> None:
    with pytest.raises(ValidationFailed, match="names no absolute path"):
        _read(source)


def test_text_in_a_bucket_is_read_from_its_copy_and_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_text("one line\n")
    source = "s3://bucket/a.txt"

    with text_copies({source: tmp_path / "copy.txt"}):
        assert _read(source) == _read(f"file://{tmp_path}/copy.txt")
        assert describe_source(source, "calibration") == source
    with pytest.raises(NotAvailable, match=r"s3://bucket/a\.txt") as caught:
        _read(source)

    assert caught.value.pointer == POINTER


def test_reading_default_text_imports_no_module_it_quotes_and_no_torch() -> None:
    program = """
import sys
from compression.text.documents import read_documents, EVALUATION_MODULES
before = set(sys.modules)
assert len(list(read_documents("default", "evaluation", pointer=""))) >= len(EVALUATION_MODULES)
assert len(list(read_documents("default", "calibration", pointer=""))) > 50
print(sorted(set(sys.modules) - before), "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "['pydoc_data', 'pydoc_data.topics'] False"


def test_default_evaluation_text_is_the_docstrings_in_their_order() -> None:
    text = docstrings("textwrap")

    places = [
        text.index(start)
        for start in ("Text wrapping and filling.", "Object for wrapping/filling text", "Wrap a single paragraph")
    ]

    assert places == sorted(places)
    assert len(set(EVALUATION_MODULES)) == len(EVALUATION_MODULES)


def test_the_report_names_a_source_without_repeating_inline_text() -> None:
    assert describe_source(InlineText(inline=("secret", "words")), "calibration") == "inline (2 documents)"
    assert describe_source("file:///a.txt", "evaluation") == "file:///a.txt"
    assert describe_source("default", "calibration") != describe_source("default", "evaluation")
