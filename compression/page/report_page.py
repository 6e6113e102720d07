"""The report as one page that needs no network: data in, HTML out. The worst news stands at the top.

The report itself is embedded in the page; whatever the page shows in figures is found there by its path (``figures.py``).
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

from compression.page.axes import in_bytes
from compression.page.bars import columns, rows
from compression.page.derived import LEDGER_ROWS, derive
from compression.page.figures import RULES, Figures
from compression.page.maps import fates, likenesses, usage
from compression.page.plots import Mark, frontier_plot, measured_plot
from compression.plan import FrontierPoint

Json = dict[str, Any]
_HERE = Path(__file__).parent
_COMPONENTS = {
    "experts": "experts", "shared_experts": "shared experts", "router": "routers", "attention": "attention",
    "dense": "dense layers", "embeddings": "embeddings", "other": "other", "kv_cache": "key-value cache", "overhead": "overhead",
}  # fmt: skip

_ABSENT: Json = {
    "benchmarks": None, "generation": None, "speed": None, "not_measured": [], "study": None, "planning": None, "analysis": None,
    "seconds": {}, "request": None,
}  # fmt: skip
"""What a report may lack: the artifact's own leaves out what differs between equal runs, and older ones have fewer fields."""


def report_page(report: Json) -> str:
    """Return the page of a report, as stored by a job or as it lies in an artifact. Equal reports make equal pages."""
    data = {**_ABSENT, **report, "page": derive(report)}
    if len(report["ledger"]) > LEDGER_ROWS:
        data["ledger"] = []
    return (
        _templates()
        .get_template("report.html")
        .render(
            report=data,
            fig=Figures(data),
            embedded=_embedded(data),
            style=Markup(_text("report.css")),
            script=Markup(_text("report.js")),
            plots=_plots(data),
            recipe=_recipe(data),
            whole_ledger=len(report["ledger"]) <= LEDGER_ROWS,
        )
    )


@cache
def page_policy() -> str:
    """Return the Content-Security-Policy under which the page works: its own style, script and pictures."""
    style, script = (_hash(_text(name)) for name in ("report.css", "report.js"))
    return (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Json) -> Markup:
    """Return the data as JSON that cannot end the element that it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _plots(data: Json) -> Json:
    errors = data["page"]["errors"]
    return {
        "frontier": _frontier(data),
        "losses": _losses(data["quality"]),
        "errors": columns(
            [str(row["block"]) for row in errors],
            {
                "rounded to nearest": [row["error_before"] for row in errors],
                "as it is": [row["error_after"] for row in errors],
            },
            across="block of the artifact", up="mean relative squared error", write=lambda value: f"{value:.2g}",
        ) if errors else None,
        "components": _components(data),
        "memory": rows(
            ["weights as stored", "in stock transformers"],
            {
                "original": [data["bytes_before"], data["bytes_before"]],
                "artifact": [data["memory"].get("packed_engine"), data["memory"].get("transformers")],
            },
            up="memory", write=in_bytes,
        ),
        "speed": _speed(data.get("speed")),
        "fates": fates(data["page"]["experts"]),
        "usage": usage(data["blocks"]),
        "likenesses": likenesses(data.get("analysis")),
    }  # fmt: skip


def _frontier(data: Json) -> Markup:
    """Return size against quality: of the plans that could have been chosen, or else of the models that were made."""
    target, planning = data["target_bytes"], data["planning"]
    if planning is not None:
        points = [FrontierPoint.model_validate(point) for point in planning["frontier"]]
        chosen = next(((trial["bytes"], trial["measured_loss"]) for trial in planning["trials"] if trial["chosen"]), None)
        return frontier_plot(points, chosen=chosen, target_bytes=target, original_bytes=data["bytes_before"])
    quality = data["quality"]
    marks = [
        Mark("original", data["bytes_before"], quality["loss_before"], "original"),
        Mark("artifact", data["bytes_after"], quality["loss_after"], "artifact"),
    ]
    if (alone := quality.get("quantized_only")) is not None:
        marks.append(Mark("quantized only", alone["bytes"], alone["loss"], "other"))
    return measured_plot(marks, target_bytes=target)


def _losses(quality: Json) -> Markup:
    others = {"quantized only": quality.get("quantized_only"), "experts drawn by lot": quality.get("random_drop")}
    named = {name: other["perplexity"] for name, other in others.items() if other is not None}
    names = ["original", "artifact", *named]
    before: list[float | None] = [quality["perplexity_before"], *[None] * (len(names) - 1)]
    after: list[float | None] = [None, quality["perplexity_after"], *[None] * len(named)]
    beside: list[float | None] = [None, None, *named.values()]
    series = {"original": before, "artifact": after, "for comparison": beside}
    return rows(names, series, up="perplexity, less is better", write=RULES["perplexity"])


def _components(data: Json) -> Markup:
    named = [name for name in _COMPONENTS if data["components"].get(name)]
    sizes: list[float | None] = [data["components"][name] for name in named]
    return rows([_COMPONENTS[name] for name in named], {"artifact": sizes}, up="bytes", write=in_bytes)


def _speed(speed: Json | None) -> list[tuple[str, Markup]]:
    if speed is None:
        return []
    sizes = sorted({point["batch_size"] for point in speed["points"]})
    found = {(point["model"], point["batch_size"]): point for point in speed["points"]}
    charts = {
        "decode_tokens_per_s": ("Decoding, tokens per second", RULES["rate"]),
        "prefill_tokens_per_s": ("Prefill, tokens per second", RULES["rate"]),
        "peak_bytes": ("Most memory in use", in_bytes),
    }
    return [
        (
            title,
            rows(
                [f"batch of {size}" for size in sizes],
                {model: [found.get((model, size), {}).get(name) for size in sizes] for model in ("original", "artifact")},
                up=title,
                write=write,
            ),
        )
        for name, (title, write) in charts.items()
    ]


def _recipe(data: Json) -> str | None:
    """Return the request as the recipe file that does it again; None where the report does not hold it."""
    request = data.get("request")
    return None if request is None else yaml.safe_dump(request, sort_keys=False, allow_unicode=True, width=100)
