"""A report as one self-contained HTML page: no request leaves it, and every number says where in the report it stands.

The report is embedded whole, as JSON, except for a ledger that is long. A number that is shown carries its path there as
``data-from`` and the exact value as ``value``. Whatever a stranger wrote is text here and never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compression.page.aggregate import page_data
from compression.page.axes import in_bytes, short
from compression.page.figures import figures_of
from compression.report import Report

_HERE = Path(__file__).parent / "templates"


def report_page(report: dict[str, Any] | Report, *, job: dict[str, Any] | None = None) -> str:
    """Return the page; ``job``: its view, where one made the report, with the request as it was accepted."""
    data = report.model_dump(mode="json") if isinstance(report, Report) else report
    shown = page_data(data)
    show = _Shown(shown)
    template = _environment().get_template("report.html")
    return template.render(
        report=shown,
        page=shown["page"],
        show=show,
        figures=figures_of(shown),
        recipe=yaml.safe_dump({"recipe": {"steps": list(data["steps"])}}, sort_keys=False, allow_unicode=True),
        request=None if job is None else _request(job["request"]),
        embedded=_embedded(shown),
        style=Markup(_text("report.css")),
        script=Markup(_text("report.js")),
    )


@cache
def content_security_policy() -> str:
    """Return the policy that lets the page's own style and script run, and nothing else load."""
    style, script = _hash(_text("report.css")), _hash(_text("report.js"))
    return (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _request(request: dict[str, Any]) -> str:
    """Return what to post again; where the first caller wanted to be told is nobody else's business."""
    again = {name: value for name, value in request.items() if name != "webhook" and value is not None}
    return json.dumps(again, indent=2, ensure_ascii=False)


class _Shown:
    """Turns a path of the report into the number as people read it, with the path beside it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def __call__(self, path: str, form: str = "number") -> Markup:
        value: Any = self._data
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        if value is None:
            return Markup('<data data-from="{}" value="null">not known</data>').format(path)
        return Markup('<data data-from="{}" value="{}">{}</data>').format(path, json.dumps(value), _FORMS[form](value))


_FORMS = {
    "number": short,
    "bytes": in_bytes,
    "exact": lambda value: f"{value:,}",
    "percent": lambda value: f"{100 * value:.1f}%",
    "error": lambda value: f"{100 * value:.3f}%",
    "fine": lambda value: f"{value:.4f}",
    "times": lambda value: f"{value:.2f}×",
    "two": lambda value: f"{value:.2f}",
}


def _embedded(data: dict[str, Any]) -> Markup:
    """Return JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
