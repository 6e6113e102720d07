"""Text of a hub data set: the named config and split, streamed, with the hub's refusals told apart.

``datasets`` reads its endpoint when it is imported, so one fresh process reads every source in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.fake_hub import FakeHub

ROWS = 2000
_CARD = """---
configs:
- config_name: big
  default: true
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: small
  data_files: data/test-*
---
"""
_PROGRAM = """
import json, sys
from compression.text.documents import read_documents
from compression.errors import RequestError

def head(source):
    try:
        return [piece.text for _, piece in zip(range(3), read_documents(source, "calibration", pointer="/p"))]
    except RequestError as error:
        return [type(error).__name__, error.message, error.pointer, error.retryable]

print(json.dumps({source: head(source) for source in sys.argv[1:]}))
"""
SOURCES = (
    "hub:some/parquet", "hub:some/parquet:test", "hub:some/parquet:small", "hub:some/parquet:big:test", "hub:some/parquet::test",
    "hub:some/parquet:nowhere", "hub:some/parquet:nowhere:train", "hub:some/lines", "hub:some/other-column", "hub:some/broken",
    "hub:some/gated", "hub:some/missing", "hub:json", "hub:tests/compression", "hub:../tests", "hub:some/a:b:c:d",
)  # fmt: skip


def _fill(hub: FakeHub, folder: Path) -> None:
    for name in ("parquet/data", "lines", "other-column", "broken", "gated"):
        (folder / name).mkdir(parents=True)
    table = pyarrow.table({"text": [f"row {row}" for row in range(ROWS)], "n": list(range(ROWS))})
    pyarrow.parquet.write_table(table, folder / "parquet/data/train-00000-of-00001.parquet", row_group_size=100)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["held out"]}), folder / "parquet/data/test-00000-of-00001.parquet")
    (folder / "parquet/README.md").write_text(_CARD)
    (folder / "lines/train.jsonl").write_text("".join(json.dumps({"text": f"line {row}"}) + "\n" for row in range(9)))
    (folder / "other-column/train.jsonl").write_text('{"content": "x"}\n')
    (folder / "broken/train.jsonl").write_text('{"text": "x"}\n{broken\n')
    (folder / "gated/train.jsonl").write_text('{"text": "x"}\n')
    for name in ("parquet", "lines", "other-column", "broken"):
        hub.add_dataset(f"some/{name}", folder / name)
    hub.add_dataset("some/gated", folder / "gated", gated_for="hf_token")


def _run(environment: dict[str, str], *sources: str) -> dict[str, list[object]]:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", _PROGRAM, *sources], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[object]]]:
    """Source -> its first three documents, or the refusal."""
    folder = tmp_path_factory.mktemp("hub")
    with FakeHub() as hub:
        _fill(hub, folder)
        yield _run(hub.environment(folder / "cache"), *SOURCES)


@pytest.mark.parametrize(
    ("source", "documents"),
    [
        ("hub:some/parquet", ["row 0", "row 1", "row 2"]),
        ("hub:some/parquet:test", ["held out"]),
        ("hub:some/parquet:small", ["held out"]),
        ("hub:some/parquet:big:test", ["held out"]),
        ("hub:some/parquet::test", ["held out"]),
        ("hub:some/lines", ["line 0", "line 1", "line 2"]),
    ],
)
def test_the_named_config_and_split_are_read(source: str, documents: list[str], heads: dict[str, list[object]]) -> None:
    assert heads[source] == documents


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:some/parquet:nowhere", "nowhere"),
        ("hub:some/parquet:nowhere:train", "Available: ['big', 'small']"),
        ("hub:some/other-column", "row 1 of hub:some/other-column has no \"text\"; it has 'content'"),
        ("hub:some/broken", "JSON parse error"),
        ("hub:some/gated", "gated"),
        ("hub:some/missing", "doesn't exist on the Hub"),
        ("hub:some/a:b:c:d", "is not a dataset"),
    ],
)
def test_what_no_retry_can_mend_is_refused_by_name(source: str, message: str, heads: dict[str, list[object]]) -> None:
    kind, text, pointer, retryable = heads[source]

    assert kind == "ValidationFailed"
    assert message in str(text)
    assert pointer == "/p"
    assert retryable is False


@pytest.mark.parametrize("source", ["hub:json", "hub:tests/compression", "hub:../tests"])
def test_neither_a_folder_here_nor_a_file_format_passes_for_a_data_set(source: str, heads: dict[str, list[object]]) -> None:
    kind, text, *_ = heads[source]

    assert kind == "ValidationFailed"
    assert "is not a dataset" in str(text) or "doesn't exist on the Hub" in str(text)


def test_a_hub_out_of_reach_may_be_tried_again(tmp_path: Path) -> None:
    with FakeHub() as hub:
        environment = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"}

    (answer,) = _run(environment, "hub:some/lines").values()

    assert answer[0] == "SourceUnavailable"
    assert answer[2:] == ["/p", True]
