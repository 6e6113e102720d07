"""The page: every number is the report's, no name becomes markup, nothing is fetched, and the largest model's fits."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from compression.page.axes import in_bytes, ticks
from compression.page.report_page import content_security_policy, report_page
from tests.compression.page.made_report import made_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{7*7}}"


class Page(HTMLParser):
    """Elements, the numbers that name their source, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str | None, str]] = []
        self.scripts: list[str] = []
        self._open: tuple[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.elements.append((tag, named))
        source = named.get("data-from")
        self._open = (source, named.get("value")) if source is not None else None
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.numbers.append((*self._open, data))
            self._open = None
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


UNITS = {"%": 0.01, "×": 1, "": 1, "s": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.mark.parametrize("blocks", [3, 200])
def test_every_number_that_is_shown_is_that_of_the_embedded_report(blocks: int):
    page = Page(report_page(made_report(blocks=blocks)))
    embedded = json.loads(page.scripts[0])

    assert len(page.numbers) > 50
    for path, exact, shown in page.numbers:
        value = at(embedded, path)
        if value is None:
            assert shown == "not known"
            continue
        assert exact is None or json.loads(exact) == value
        match = re.fullmatch(r"([\d.,e+-]+)\s*(\S*)", shown)
        assert match is not None, shown
        # Shown to a hundredth, at least, or to three digits.
        assert float(match[1].replace(",", "")) * UNITS[match[2]] == pytest.approx(value, rel=6e-3, abs=6e-3), path


def test_a_page_embeds_the_whole_report_and_says_where_a_long_ledger_is():
    short, long = made_report(), made_report(blocks=200)

    told = [report_page(short), report_page(long)]

    assert {**json.loads(Page(told[0]).scripts[0]), "page": None} == {**short.model_dump(mode="json"), "page": None}
    assert json.loads(Page(told[1]).scripts[0])["ledger"] == []
    assert ["report.json</code> has them all" in text for text in told] == [False, True]


def test_what_a_stranger_wrote_is_never_markup():
    plain, evil = (Page(report_page(made_report(name), job={"request": {"model": name}})) for name in ("owner/name", EVIL))

    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in plain.elements]
    assert not any(name.startswith("on") for _, attributes in evil.elements for name in attributes)
    assert json.loads(evil.scripts[0])["model"] == EVIL


def test_nothing_is_fetched_and_the_policy_lets_the_pages_own_script_run():
    page = Page(report_page(made_report()))

    links = [value for _, named in page.elements for name, value in named.items() if name in ("src", "href", "srcset", "action")]
    assert links
    assert all(str(link).startswith("data:image/png;base64,") for link in links)
    assert not any("style" in named for _, named in page.elements)
    assert content_security_policy().startswith("default-src 'none';")


def test_the_webhook_of_the_job_is_not_told():
    text = report_page(made_report(), job={"request": {"model": "m", "webhook": {"url": "https://told.example/hook"}}})

    assert "told.example" not in text


def test_the_page_of_what_lies_in_the_artifact_is_the_same_each_time():
    first, second = made_report(seconds={"compressing": 1.0}), made_report(seconds={"compressing": 2.0})

    assert report_page(first.for_artifact()) == report_page(second.for_artifact())


def test_the_largest_model_fits_into_three_megabytes():
    assert len(report_page(made_report(blocks=61, experts=256)).encode()) < 3_000_000


@pytest.mark.parametrize(("low", "high"), [(0, 43.03), (0.0, 0.0), (3.8, 3.9), (1e-9, 2e-9)])
def test_ticks_are_round_and_cover_what_is_drawn(low: float, high: float):
    found = ticks(low, high)

    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 8


def test_sizes_are_told_in_powers_of_a_thousand():
    assert [in_bytes(size) for size in (0, 999, 43_063_256)] == ["0 bytes", "999 bytes", "43.06 MB"]
