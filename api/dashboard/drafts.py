"""A form becomes the body of a POST, is planned or refused as that would be, and each fault finds its field again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from api.dependencies import parse_job_request
from api.errors import Problem, problem_of
from api.schemas import JobRequest
from api.service import Service
from api.submission import plan_request
from compression.errors import RequestError
from compression.request import parse_bytes
from jobs.tables import Document

_EVERYTHING = str(2**62)
"""A target that any model fits, to learn what there is to choose from."""
_BY_POINTER = {
    "/model": "model", "/revision": "revision", "/profile": "profile", "/target_memory": "target_memory", "/recipe": "steps",
    "/constraints": "min_retention", "/labels": "labels", "/serving/context_tokens": "context_tokens",
    "/serving/batch_size": "batch_size", "/calibration/source/inline": "calibration_text",
    "/calibration/source": "calibration_source",
    "/calibration/samples": "calibration_samples", "/calibration/sequence_length": "calibration_length",
    "/evaluation/perplexity/source/inline": "evaluation_text", "/evaluation/perplexity/source": "evaluation_source",
    "/evaluation/perplexity/samples": "evaluation_samples", "/evaluation/benchmarks": "benchmarks", "/evaluation/speed": "speed",
}  # fmt: skip
"""Where a fault is -> the field of the form that it came from."""
_INTEGERS = {
    "calibration_samples": ("calibration", "samples"), "calibration_length": ("calibration", "sequence_length"),
    "evaluation_samples": ("evaluation", "perplexity", "samples"), "context_tokens": ("serving", "context_tokens"),
    "batch_size": ("serving", "batch_size"),
}  # fmt: skip
_TEXTS = {
    "model": ("model",), "revision": ("revision",), "profile": ("profile",), "target_memory": ("target_memory",),
    "calibration_source": ("calibration", "source"), "evaluation_source": ("evaluation", "perplexity", "source"),
}  # fmt: skip
DEFAULTS = {
    **dict.fromkeys((*_TEXTS, *_INTEGERS, "steps", "calibration_text", "evaluation_text", "benchmarks", "speed"), ""),
    "revision": "main", "profile": "portable", "recipe": "auto", "min_retention": "", "labels": "",
}  # fmt: skip
"""Every field of an empty form."""


@dataclass(frozen=True, slots=True)
class Considered:
    """What came of a form: the plan, or why there is none, and what there is to choose from."""

    plan: Document | None = None
    problem: Problem | None = None
    faults: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Field -> what is wrong with it. The empty name has what belongs to no field."""
    range: Document | None = None
    """The plan of a target that everything fits: smallest possible, original, frontier."""
    target: int | None = None
    """The target that was refused, for the plot."""


def consider(service: Service, fields: Mapping[str, str]) -> Considered:
    """Plan what the form asks for; nothing is recorded."""
    if not fields.get("model", "").strip():
        return Considered()
    try:
        plan = _planned(service, fields)
        return Considered(plan=plan, range=plan)
    except (Problem, RequestError) as error:
        problem = problem_of(error)
    target = parse_target(fields.get("target_memory", ""))
    return refused(problem, _range(service, fields, problem), target)


def refused(problem: Problem, found: Document | None = None, target: int | None = None) -> Considered:
    """Sort a problem's faults by field."""
    faults: dict[str, list[str]] = {}
    for fault in problem.errors:
        faults.setdefault(_field_of(fault.get("pointer") or ""), []).append(str(fault["detail"]))
    return Considered(problem=problem, faults=faults, range=found, target=target)


def request_of(fields: Mapping[str, str]) -> JobRequest:
    """Return the request that the form stands for, checked as any other."""
    return parse_job_request(json.dumps(body_of(fields)).encode())


def body_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of the POST that the form stands for; what was left empty is left out."""
    body: dict[str, Any] = {}
    given = {name: value.strip() for name, value in fields.items() if value.strip()}
    for name, path in _TEXTS.items():
        if name in given:
            _put(body, path, _bytes(given[name]) if name == "target_memory" else given[name])
    for name, path in _INTEGERS.items():
        if name in given:
            _put(body, path, int(given[name]) if _is_number(given[name]) else given[name])
    for name, path in (
        ("calibration_text", ("calibration", "source")),
        ("evaluation_text", ("evaluation", "perplexity", "source")),
    ):
        if name in given:
            _put(body, path, {"inline": [fields[name]]})
    if given.get("recipe") == "steps":
        body["recipe"] = _steps(given.get("steps", ""))
    if "benchmarks" in given:
        _put(body, ("evaluation", "benchmarks"), [name.strip() for name in given["benchmarks"].split(",") if name.strip()])
    if "speed" in given:
        _put(body, ("evaluation", "speed"), True)
    if "min_retention" in given:
        _put(body, ("constraints", "min_retention"), _decimal(given["min_retention"]))
    if "labels" in given:
        body["labels"] = _labels(given["labels"])
    return body


def _planned(service: Service, fields: Mapping[str, str]) -> Document:
    """Return the plan in the form in which a job's row keeps it."""
    return plan_request(request_of(fields), service.settings)[0].model_dump(mode="json")


def parse_target(text: str) -> int | None:
    """Return the bytes that a field says, if it says any."""
    try:
        value = parse_bytes(_bytes(text.strip()))
    except ValueError:
        return None
    return value if isinstance(value, int) else None


def _range(service: Service, fields: Mapping[str, str], problem: Problem) -> Document | None:
    """Return what a target can be chosen from, where the target was the trouble."""
    if fields.get("recipe") == "steps" or (fields.get("target_memory", "").strip() and problem.code != "target_unreachable"):
        return None
    try:
        return _planned(service, {**fields, "target_memory": _EVERYTHING})
    except (Problem, RequestError):
        return None  # something else is wrong as well, and the problem at hand says what


def _field_of(pointer: str) -> str:
    return next((_BY_POINTER[known] for known in sorted(_BY_POINTER, reverse=True) if pointer.startswith(known)), "")


def _put(body: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        body = body.setdefault(name, {})
    body[path[-1]] = value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


def _bytes(text: str) -> int | str:
    """Return bare digits as bytes; what has a unit is read as the contract reads it."""
    digits = text.replace(",", "").replace("_", "")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 20 else text


def _decimal(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _steps(text: str) -> Any:
    """Return the recipe that the text holds: the list of its steps, or the object around it."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fault("/recipe", f"the recipe is not JSON: {error}") from error
    return {"steps": cast("list[Any]", given)} if isinstance(given, list) else given


def _labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, equals, value = line.partition("=")
        if not equals:
            raise _fault("/labels", f"{line[:80]!r} is not a label; write name=value, one on a line")
        labels[name.strip()] = value.strip()
    return labels


def _fault(pointer: str, detail: str) -> Problem:
    return Problem("validation_failed", detail, errors=[{"pointer": pointer, "code": "value_error", "detail": detail}])
