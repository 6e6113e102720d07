"""Prompts for generation: from the request itself, or records with "prompt", and "expected" where an answer is known.

file:///....jsonl, .json   a JSON object per line, each kind also as .gz; s3://... what the service has fetched of the same
hub:<dataset>[:config][:split]   rows of a Hugging Face dataset with those columns, streamed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from compression.errors import RequestError, ValidationFailed
from compression.request import GenerationSettings, Prompt
from compression.text.documents import json_records, local_file
from compression.text.records import encodable

_POINTER = "/evaluation/generation/source"


def read_prompts(settings: GenerationSettings) -> tuple[list[Prompt], dict[str, Any]]:
    """Return the first ``prompts`` of the source, and for the report where they come from, with a hash of their content."""
    if isinstance(settings.source, tuple):
        given = (prompt if isinstance(prompt, Prompt) else Prompt(prompt=prompt) for prompt in settings.source)
        label = f"inline ({len(settings.source)} prompts)"
    else:
        given, label = _read(settings.source), settings.source
    try:
        prompts = list(islice(given, settings.prompts))
    except RequestError as error:
        error.pointer = error.pointer or _POINTER
        raise
    if not prompts:
        raise ValidationFailed(f"{label} holds no prompt", pointer=_POINTER)
    content = json.dumps([prompt.model_dump() for prompt in prompts], sort_keys=True)
    return prompts, {
        "source": label,
        "prompts_asked": settings.prompts,
        "prompts": len(prompts),
        "content_hash": hashlib.sha256(content.encode()).hexdigest(),
    }


def _read(source: str) -> Iterator[Prompt]:
    for record, place in _records(source):
        if not isinstance(record, dict) or "prompt" not in record:
            raise ValidationFailed(f'{place} is not an object with "prompt"')
        known: dict[str, Any] = record
        prompt, expected = known["prompt"], known.get("expected")
        if not isinstance(prompt, str) or not prompt or not isinstance(expected, str | None):
            raise ValidationFailed(f'{place}: "prompt" must be a string that is not empty, "expected" a string if it is there')
        if expected is not None and not expected.strip():
            raise ValidationFailed(f'{place}: "expected" is blank; leave it out where nothing is expected')
        yield Prompt(prompt=encodable(prompt, place), expected=None if expected is None else encodable(expected, place))


def _records(source: str) -> Iterator[tuple[object, str]]:
    if source.startswith("hub:"):
        from compression.text.hub import stream_records

        return stream_records(source)
    path = local_file(source)
    if path.name.lower().removesuffix(".gz").rpartition(".")[2] not in ("jsonl", "json"):
        raise ValidationFailed(f'{path} is not a file of prompts; use .jsonl or .json, a JSON object with "prompt" per line')
    return json_records(path)
