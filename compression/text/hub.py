"""Text of a Hugging Face dataset, streamed: nothing is downloaded beyond the rows that are asked for.

The ``datasets`` library reads it, and runs no code of the dataset's own. Given a plain name it would rather open a
folder of that name, or take a word such as "json" for a file format; ``hf://datasets/`` in front rules both out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compression.errors import SlimtrimError, SourceUnavailable, ValidationFailed
from compression.text.records import text_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEFAULT_SPLIT = "train"


def stream_texts(source: str) -> Iterator[str]:
    """Yield the texts of ``hub:<dataset>[:config][:split]``."""
    return (text_of(record, place) for record, place in stream_records(source))


def stream_records(source: str) -> Iterator[tuple[object, str]]:
    """Yield the rows of ``hub:<dataset>[:config][:split]``, each with its place for errors."""
    name, *parts = source.removeprefix("hub:").split(":")
    if _NAME.fullmatch(name) is None or len(parts) > 2:
        raise ValidationFailed(f"{source!r} is not a dataset; write hub:<owner>/<dataset>[:config][:split]")
    with _named_errors(name):
        for row, record in enumerate(_rows(f"hf://datasets/{name}", parts), start=1):
            yield record, f"row {row} of {source}"


def _rows(path: str, parts: list[str]) -> Iterator[Any]:
    import datasets

    config, split = _config_and_split(path, parts)
    return iter(datasets.load_dataset(path, config, split=split, streaming=True))


def _config_and_split(path: str, parts: list[str]) -> tuple[str | None, str]:
    import datasets

    match parts:
        case [config, split]:
            return config or None, split or _DEFAULT_SPLIT
        case [word] if word in datasets.get_dataset_config_names(path):
            return word, _DEFAULT_SPLIT
        case [word] if word:
            return None, word
    return None, _DEFAULT_SPLIT


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except SlimtrimError:
        raise
    except (DatasetsError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ValidationFailed(f"dataset {name!r} cannot be read so: {error}") from error
    except Exception as error:
        # What is left comes from the network, as classes of whichever HTTP client the hub library uses.
        raise SourceUnavailable(f"dataset {name!r} did not answer: {error}") from error
