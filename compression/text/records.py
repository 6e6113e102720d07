"""One record of a data set: its text, or a refusal that names the record."""

from __future__ import annotations

from typing import Any

from compression.errors import ValidationFailed


def text_of(record: object, place: str) -> str:
    """Return a record's "text"; null counts as empty. ``place`` names the record in the error."""
    if not isinstance(record, dict):
        raise ValidationFailed(f'{place} is not an object with "text" but {type(record).__name__}')
    if "text" not in record:
        raise ValidationFailed(f'{place} has no "text"; it has {", ".join(map(repr, record)) or "nothing"}')
    text: Any = record["text"]
    if text is not None and not isinstance(text, str):
        raise ValidationFailed(f'{place}: "text" is {type(text).__name__}, not a string')
    return encodable(text or "", place)


def encodable(text: str, place: str) -> str:
    """Return the text, or refuse it where a lone surrogate makes it no text at all."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationFailed(f"{place} is not valid text: {error.reason} at character {error.start}") from error
    return text
