"""The page of a report: its figures are the data's, strangers' text stays text, and it fits whatever the model's size."""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compression.__main__ import read_request
from compression.page.axes import in_bytes, ticks
from compression.page.derived import LEDGER_ROWS, derive
from compression.page.figures import RULES, resolve
from compression.page.pixels import picture
from compression.page.report_page import page_policy, report_page
from compression.request import Compression
from tests.compression.made_reports import STRANGE, full_report


class Page(HTMLParser):
    """What a browser makes of the page, as far as the tests ask."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, str | None]] = []
        self.embedded = ""
        self._inside: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._inside = None
        if tag == "data":
            self.figures.append({**given, "shown": ""})
            self._inside = "figure"
        if tag == "script" and given.get("type") == "application/json":
            self._inside = "embedded"

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "figure":
            self.figures[-1]["shown"] = (self.figures[-1]["shown"] or "") + data
        if self._inside == "embedded":
            self.embedded += data


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return full_report().model_dump(mode="json")


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> Page:
    return Page(report_page(report))


def test_every_figure_is_the_number_at_its_path_in_the_embedded_data(page: Page):
    data = json.loads(page.embedded)

    assert len(page.figures) > 60
    for figure in page.figures:
        value = resolve(data, figure["data-from"] or "")
        assert value is not None, figure
        assert str(value) == figure["value"], figure
        assert RULES[figure["data-as"] or ""](value) == figure["shown"], figure


def test_the_embedded_data_are_the_report(page: Page, report: dict[str, Any]):
    data = json.loads(page.embedded)

    assert {name: data[name] for name in report} == report
    assert set(data) - set(report) <= {"page", "request"}


def test_the_worst_news_come_before_everything_else(report: dict[str, Any]):
    page = report_page(report)

    assert page.index("lost much") < page.index("no room for") < page.index("Size against quality")


def test_what_quantization_and_trims_cost_adds_up(page: Page):
    levers = {row["lever"]: row["loss"] for row in json.loads(page.embedded)["page"]["levers"]}

    assert levers["quantization alone"] == pytest.approx(0.0625)
    assert levers["quantization alone"] + levers["what the trims add"] == pytest.approx(levers["everything"])


def test_every_expert_has_its_fate_and_its_bits(page: Page):
    rows = json.loads(page.embedded)["page"]["experts"]

    assert [row["fate"] for row in rows] == ["xkkk", "xxxx", "kkxk"]
    assert rows[0]["bits"] == [None, 4.25, 4.25, 4.25]
    assert rows[2]["bits"] == [4.25, 4.25, None, 4.25]


def test_experts_of_a_block_that_lost_its_moe_layer_are_gone_and_merged_ones_are_told(report: dict[str, Any]):
    first, second, third = report["blocks"]
    first = {**first, "moe_layer": "drop", "experts_kept": [1, 2]}
    third = {**third, "experts_kept": [0, 1], "merged": {"0": [0, 3], "1": [1]}}

    rows = derive({**report, "blocks": [first, second, third]})["experts"]

    assert [row["fate"] for row in rows] == ["xxxx", "xxxx", "kkxm"]


def test_the_method_that_left_the_largest_error_comes_first(report: dict[str, Any]):
    ledger = [dict(row) for row in report["ledger"]]
    for row in ledger:
        row["error_after"] = 0.5 if row["method_used"] == "gptq" else 0.25

    told = derive({**report, "ledger": ledger})["ledger"]

    assert [(row["method"], row["error_after"]) for row in told] == [("gptq", 0.5), ("rtn", 0.25)]
    assert [row["instead"] for row in told] == [0, sum(row["method_used"] == "rtn" for row in ledger)]


def test_a_path_that_leads_nowhere_is_a_mistake_and_not_a_dash(report: dict[str, Any]):
    assert resolve(report, "benchmarks.rows[1].chance") is None
    with pytest.raises(KeyError):
        resolve(report, "quality.perplexity_befor")


def test_strangers_text_stays_text():
    page = Page(report_page(full_report(name=STRANGE).model_dump(mode="json")))

    assert [tag for tag, _ in page.tags].count("script") == 2
    assert all(given["src"].startswith("data:image/png;base64,") for tag, given in page.tags if tag == "img")
    assert not [given for _, given in page.tags if any(name.startswith("on") for name in given)]
    assert json.loads(page.embedded)["model"] == STRANGE
    assert "<" not in page.embedded


def test_the_page_asks_nobody_for_anything(page: Page):
    asked = [given[name] for _, given in page.tags for name in ("src", "href", "action", "data") if given.get(name)]

    assert all(address.startswith("data:") for address in asked)
    assert "style" not in {name for _, given in page.tags for name in given}, "its policy allows no style attribute"
    assert page_policy().startswith("default-src 'none'; style-src 'sha256-")


def test_equal_reports_make_equal_pages(report: dict[str, Any]):
    assert report_page(json.loads(json.dumps(report))) == report_page(report)


def test_a_report_that_lies_in_an_artifact_has_a_page_too():
    page = Page(report_page(full_report().for_artifact()))

    assert page.figures
    assert "seconds" not in full_report().for_artifact()


def test_the_page_of_61_blocks_of_256_experts_is_under_3_mb():
    report = full_report(61, 256).model_dump(mode="json")

    made = report_page(report)
    page = Page(made)

    assert len(report["ledger"]) > LEDGER_ROWS
    assert len(made.encode()) < 3_000_000
    assert json.loads(page.embedded)["ledger"] == []
    assert "report.json all of them" in made
    assert json.loads(page.embedded)["page"]["ledger_rows"] == len(report["ledger"])


def test_a_picture_has_the_cells_it_was_given():
    cells = [[0, 1, 2], [2, 1, 0]]
    png = b64decode(picture(cells, [(0, 0, 0), (1, 2, 3), (250, 251, 252)]).partition(",")[2])

    place, found = 8, dict[bytes, bytes]()
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        name, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(name + body)
        found[name] = body
        place += 12 + length

    assert struct.unpack(">II", found[b"IHDR"][:8]) == (3, 2)
    assert found[b"PLTE"] == bytes([0, 0, 0, 1, 2, 3, 250, 251, 252])
    assert zlib.decompress(found[b"IDAT"]) == bytes([0, 0, 1, 2, 0, 2, 1, 0])


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 bytes"), (1000, "1.00 kB"), (2_100_000, "2.10 MB"), (94_000_000_000, "94.00 GB")]
)
def test_sizes_are_told_in_steps_of_a_thousand(count: int, text: str):
    assert in_bytes(count) == text


@pytest.mark.parametrize("most", [0.0, 0.0073, 0.5, 1.0, 99.0, 12345.0])
def test_axes_have_round_steps_that_hold_the_largest(most: float):
    steps = ticks(0.0, most, 4)

    assert steps[0] == 0
    assert steps[-1] >= most
    assert 2 <= len(steps) <= 7


def test_the_recipe_on_the_page_is_the_request_that_the_report_answers(tmp_path: Path):
    request = Compression.model_validate(
        {
            "model": "owner/name",
            "recipe": {"steps": [{"step": "quantize"}]},
            "target_memory": "3MB",
            "evaluation": {"speed": True},
        }
    )
    report = full_report().model_copy(update={"request": request.model_dump(mode="json")})
    page = report_page(report.model_dump(mode="json"))

    (tmp_path / "recipe.yaml").write_text(unescape(page.split('<code id="recipe">')[1].split("</code>")[0]))

    assert read_request(tmp_path / "recipe.yaml", tmp_path) == request
