"""A whole request: which model, which recipe, how much memory, how it will be served, and on which text it is judged.

``Compression`` is what the command line reads from a recipe file and what the body of ``POST /v1/jobs`` extends. Whether a
legal request can be met *today* is not decided here but in ``plan.py``, by name.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, field_validator, model_validator

from compression.recipe import Profile, Recipe, Settings

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,19}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)
_MOST_BYTES = 2**63 - 1


def parse_bytes(value: object) -> object:
    """Return the bytes in an integer or a string such as ``"20GB"`` (10^9) or ``"20GiB"`` (2^30)."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f'{value!r} is not a size; write an integer, "20GB" (10^9) or "20GiB" (2^30)')
    return int(Decimal(match[1]) * _UNITS[match[2].upper()])  # a float would make "4.35GB" a byte less


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(ge=0, le=_MOST_BYTES, json_schema_extra={"anyOf": [{"type": "integer"}, {"type": "string"}]}),
]


class Serving(Settings):
    """How the artifact will be served; decides the key-value cache and what must divide what."""

    context_tokens: Annotated[int, Field(ge=0, le=2**31)] = 0
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 1
    tensor_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    expert_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    overhead: Bytes = 0


class Constraints(Settings):
    """The worst that is still acceptable."""

    min_retention: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    on_violation: Literal["fail", "report"] = "fail"


_MAX_INLINE = 2**20


class InlineText(Settings):
    """Documents given in the request itself, 1 MiB at most."""

    inline: Annotated[tuple[str, ...], Field(min_length=1)]

    @field_validator("inline")
    @classmethod
    def _small(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        size = sum(len(text.encode()) for text in texts)
        if size > _MAX_INLINE:
            raise ValueError(f"inline text is {size} bytes; at most {_MAX_INLINE}: put longer text in a file")
        return texts


def _known_text_source(source: str) -> str:
    if source == "default" or re.match(r"(hub:|s3://|file://)", source):
        return source
    raise ValueError(
        f"{source!r} is not a text source; "
        'write "hub:<dataset>[:config][:split]", "s3://...", "file://..." or {"inline": [...]}'
    )


TextSource = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_known_text_source)] | InlineText


class Domain(Settings):
    """One kind of text in a mixture."""

    source: TextSource
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    name: str | None = None


class Calibration(Settings):
    """The text that statistics are taken on. ``"default"`` is for trying slimtrim out; the report says so."""

    source: TextSource | Annotated[tuple[Domain, ...], Field(min_length=1, max_length=16)] = "default"
    samples: Annotated[int, Field(ge=1, le=2**20)] = 128
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Perplexity(Settings):
    """Held-out text on which loss and divergence are measured."""

    source: TextSource | Annotated[tuple[Domain, ...], Field(min_length=1, max_length=16)] = "default"
    samples: Annotated[int, Field(ge=1, le=2**20)] = 64
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] | None = Field(default=None, description="Default: as calibration.")


class Prompt(Settings):
    """What a model is asked to continue, and what its answer should begin with."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=2**17)]
    expected: Annotated[str, StringConstraints(min_length=1, max_length=2**17, pattern=r"\S")] | None = None


def _small_prompts(prompts: tuple[str | Prompt, ...]) -> tuple[str | Prompt, ...]:
    size = sum(len(p.encode()) if isinstance(p, str) else len(p.model_dump_json()) for p in prompts)
    if size > _MAX_INLINE:
        raise ValueError(f"prompts of {size} bytes; at most {_MAX_INLINE}: put longer sets in a file")
    if not all(p for p in prompts):
        raise ValueError("a prompt is empty")
    return prompts


def _not_default(source: str) -> str:
    if source == "default":
        raise ValueError('there is no default set of prompts; name a file of JSON lines with "prompt", or list prompts')
    return _known_text_source(source)


PromptSource = (
    Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_not_default)]
    | Annotated[tuple[str | Prompt, ...], Field(min_length=1, max_length=4096), AfterValidator(_small_prompts)]
)


class GenerationSettings(Settings):
    """Prompts that both models continue greedily."""

    source: PromptSource = Field(
        description='"file://...", "hub:..." or "s3://..." of records with "prompt", or prompts themselves.'
    )
    prompts: Annotated[int, Field(ge=1, le=4096, description="The first so many of the source.")] = 32
    new_tokens: Annotated[int, Field(ge=1, le=8192, description="Per prompt, at most.")] = 64


class SpeedSettings(Settings):
    """What is timed: prefill of a context, then decoding token by token, several rounds of both."""

    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=8)] = (1, 8)
    context_tokens: Annotated[int, Field(ge=1, le=2**20)] = 128
    new_tokens: Annotated[int, Field(ge=1, le=2**16)] = 32
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5


TaskName = Annotated[str, StringConstraints(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+:|-]*$")]


class Evaluation(Settings):
    """What is measured on the original and on the artifact."""

    perplexity: Perplexity = Perplexity()
    baselines: bool = Field(default=False, description="Also measure the same quantization without the trims.")
    benchmarks: Annotated[tuple[TaskName, ...], Field(max_length=64, description="Tasks of lm-evaluation-harness.")] = ()
    benchmark_limit: Annotated[int, Field(ge=1, le=2**31)] | None = Field(default=None, description="Samples per task at most.")
    batch_size: Annotated[int, Field(ge=1, le=1024, description="Of benchmarks and generation.")] = 8
    generation: GenerationSettings | None = None
    speed: bool | SpeedSettings = False

    @property
    def speed_settings(self) -> SpeedSettings | None:
        """What to time; None where nothing is."""
        return self.speed if isinstance(self.speed, SpeedSettings) else SpeedSettings() if self.speed else None


class Compression(Settings):
    """The whole request. Only ``model`` and one of ``target_memory`` and ``recipe`` are needed."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] = "main"
    target_memory: Bytes | None = None
    recipe: Literal["auto"] | Recipe = "auto"
    profile: Profile = "portable"
    serving: Serving = Serving()
    constraints: Constraints = Constraints()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _auto_needs_a_target(self) -> Compression:
        if self.recipe == "auto" and self.target_memory is None:
            raise ValueError('recipe "auto" needs target_memory; give one of target_memory and recipe')
        return self
