"""From what pydantic found wrong to what the caller reads: a JSON pointer (RFC 6901), a code, and the value at fault.

pydantic's locations also name the branch of a union that it tried (``recipe.Recipe.steps.0.prune.sparsity``). Those
are told from real keys by walking the body itself. A fault inside a branch makes noise of what the other branches
say: a fault above another one is left out, and so is "wrong type" beside a branch whose type was right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_MOST = 50
"""Faults told at once."""
_MOST_READ = 500
"""Faults looked at; a mebibyte has room for a hundred thousand, and each is compared with the others."""
_LONGEST_VALUE = 80


def faults_of(error: ValidationError, body: Any) -> list[dict[str, Any]]:
    """Return one entry per fault, innermost only, in the order of the body."""
    found = [(_pointer(fault, body), fault) for fault in error.errors(include_url=False)[:_MOST_READ]]
    pointers = {pointer for pointer, _ in found}
    typed = {pointer for pointer, fault in found if not _is_wrong_type(fault)}
    kept = [
        (pointer, fault)
        for pointer, fault in found
        if not any(other.startswith(f"{pointer}/") for other in pointers) and not (pointer in typed and _is_wrong_type(fault))
    ]
    return [{"pointer": pointer, "code": fault["type"], "detail": _detail(fault)} for pointer, fault in kept[:_MOST]]


def join(parts: Iterable[int | str]) -> str:
    """Return the JSON pointer to a place."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)


def _is_wrong_type(fault: ErrorDetails) -> bool:
    return fault["type"].endswith("_type")


def _pointer(fault: ErrorDetails, body: Any) -> str:
    parts: list[int | str] = []
    value = body
    for part in fault["loc"]:
        if isinstance(value, dict) and part in value:
            value = cast("dict[Any, Any]", value)[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(cast("list[Any]", value)):
            value = cast("list[Any]", value)[part]
        elif not (fault["type"] == "missing" and part == fault["loc"][-1]):
            continue  # the name of a union's branch
        parts.append(part)
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        parts.append("step")
    return join(parts)


def _detail(fault: ErrorDetails) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("missing", "value_error", "union_tag_invalid", "extra_forbidden"):
        return message if fault["type"] != "extra_forbidden" else f"there is no field {fault['loc'][-1]!r}"
    return f"{message}; got {_short(fault['input'])}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
