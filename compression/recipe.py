"""What the caller asks for: one class per step, the Recipe as their ordered list, and the whole request.

Every setting carries its limits and refuses what it does not know. ``Compression`` is what the command
line reads from a recipe file and what the body of ``POST /v1/jobs`` extends. Whether a legal request can be
met *today* is not decided here but in ``plan.py``, by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from compression.architectures import Component

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
IntegerScheme = Literal["W8A16", "W4A16", "W3A16", "W2A16"]
Scheme = Literal["W8A16", "W4A16", "W3A16", "W2A16", "FP8_DYNAMIC"]
SchemeOrKeep = Literal["W8A16", "W4A16", "W3A16", "W2A16", "FP8_DYNAMIC", "keep"]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Profile = Literal["portable", "custom"]

BITS: dict[str, int] = {"W8A16": 8, "W4A16": 4, "W3A16": 3, "W2A16": 2, "FP8_DYNAMIC": 8}


class Settings(BaseModel):
    """Frozen, and closed to unknown names: a mistyped setting must not cost three GPU hours."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Step(Settings):
    """One method with its settings."""


class Pattern(NamedTuple):
    """At most ``n`` non-zero weights in every ``m`` consecutive inputs."""

    n: int
    m: int


LONGEST_PATTERN = 64
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)


def parse_pattern(text: str) -> Pattern:
    """Return the numbers in a pattern such as ``"2:4"``; ValueError names what is none."""
    match = _PATTERN.fullmatch(text)
    pattern = Pattern(int(match[1]), int(match[2])) if match else None
    if pattern is None or not pattern.n < pattern.m <= LONGEST_PATTERN:
        raise ValueError(
            f'{text[:40]!r} is not a pattern; write "n:m" for at most n non-zero in every m inputs, '
            f"1 <= n < m <= {LONGEST_PATTERN}"
        )
    return pattern


def _known_pattern(text: str) -> str:
    parse_pattern(text)
    return text


PatternText = Annotated[
    str,
    AfterValidator(_known_pattern),
    Field(json_schema_extra={"pattern": f"^{_PATTERN.pattern}$", "examples": ["2:4", "4:8"]}),
]
RoutingWeighted = Annotated[bool, Field(description="Weigh each token's outer product by its routing weight (arXiv:2505.03804).")]
PropagateError = Annotated[bool, Field(description="Calibrate each block on the outputs of the already compressed ones.")]

BlockIndex = Annotated[int, Field(ge=0, lt=2**16)]
BlockIndices = Annotated[
    tuple[BlockIndex, ...],
    Field(min_length=1, description="Exactly these blocks, by their index in the source."),
]


def _count_named(data: Any, setting: str) -> Any:
    """Fill in how many blocks are named, where they are; ValueError where that contradicts the count given."""
    if not isinstance(data, dict):
        return data
    given = cast("dict[str, object]", data)
    blocks = given.get("blocks")
    if not isinstance(blocks, list | tuple):
        return given
    named = cast("Sequence[object]", blocks)
    if len(set(map(str, named))) != len(named):
        raise ValueError("blocks names a block twice")
    if given.get(setting, len(named)) != len(named):
        raise ValueError(f"blocks names {len(named)} blocks and {setting} says {given[setting]}; leave {setting} out")
    return {**given, setting: len(named)}


CALIBRATED = frozenset({"wanda", "sparsegpt", "gptq", "awq"})
"""The methods that look at what enters a weight; the others see the weight alone."""


class Prune(Step):
    """Set the least important weights inside every expert to zero."""

    step: Literal["prune"] = "prune"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0, description="Share of weights set to zero.")] | None = None
    pattern: Annotated[PatternText, Field(description="At most n non-zero in every m inputs.")] | None = None
    shared_experts: bool = False
    routing_weighted: RoutingWeighted = False
    propagate_error: PropagateError = True

    @model_validator(mode="after")
    def _one_of(self) -> Prune:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        _refuse_idle_weights(self)
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at calibration text."""
        return self.method in CALIBRATED


class BlockSchemes(Settings):
    """What one block does otherwise than the rest; None: as the rest."""

    experts: SchemeOrKeep | None = None
    attention: SchemeOrKeep | None = None
    shared_experts: SchemeOrKeep | None = None
    dense: SchemeOrKeep | None = None

    def by_component(self) -> dict[Component, str]:
        """Return the schemes that are given, by component."""
        given: dict[Component, str | None] = {
            "experts": self.experts,
            "attention": self.attention,
            "shared_experts": self.shared_experts,
            "dense": self.dense,
        }
        return {component: scheme for component, scheme in given.items() if scheme is not None}


class Quantize(Step):
    """Store the weights of every expert as small integers with a scale per group of inputs."""

    step: Literal["quantize"] = "quantize"
    method: Literal["rtn", "gptq", "awq"] = "gptq"
    scheme: Scheme = "W4A16"
    group_size: Literal[32, 64, 128, -1] | None = Field(
        None, description="Inputs that share one scale; -1: the whole row. Default 128, or the largest that divides."
    )
    attention: SchemeOrKeep = Field(default="keep", description="Scheme for the attention projections.")
    shared_experts: SchemeOrKeep = Field(default="keep", description="Scheme for shared experts.")
    dense: SchemeOrKeep = Field(default="keep", description="Scheme for the feed-forward of blocks without experts.")
    by_block: dict[BlockIndex, BlockSchemes] = Field(
        default={}, description="Blocks whose schemes are others, by their index in the source; experts only in profile custom."
    )
    routing_weighted: RoutingWeighted = False
    propagate_error: PropagateError = True

    @model_validator(mode="after")
    def _weights_of_something(self) -> Quantize:
        _refuse_idle_weights(self)
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at calibration text."""
        return self.method in CALIBRATED

    def scheme_in(self, block: int | None, component: str) -> SchemeOrKeep:
        """Return the scheme of a component in a block of the source; in one of which nothing is said, where it is None."""
        usual: dict[str, SchemeOrKeep] = {"experts": self.scheme, "attention": self.attention}
        usual |= {"shared_experts": self.shared_experts, "dense": self.dense}
        own = self.by_block.get(block) if block is not None else None
        return getattr(own, component, None) or usual.get(component, "keep")


def _refuse_idle_weights(step: Prune | Quantize) -> None:
    """Refuse routing weights where no token is looked at: a setting that does nothing is a misunderstanding."""
    if step.routing_weighted and not step.calibrated:
        raise ValueError(f"routing_weighted weighs calibration tokens, and {step.method} uses none; leave it out")


class ExpertDrop(Step):
    """Remove the experts that a criterion ranks lowest."""

    step: Literal["expert_drop"] = "expert_drop"
    criterion: Literal[
        "routing_score", "frequency", "expert_norm", "reap", "man", "msan", "hope", "aimer", "reconstruction", "random"
    ] = "reap"
    scope: Literal["layer", "global"] = "layer"
    experts_kept: Annotated[int, Field(gt=0, description="Routed experts left in each MoE layer.")] | None = None
    fraction_dropped: Fraction | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Of the criterion random; the others have no use for it.")] = 0
    experts_kept_in: dict[BlockIndex, Annotated[int, Field(gt=0)]] = Field(
        default={}, description="Blocks whose MoE layer keeps another number than experts_kept, with that number."
    )

    @model_validator(mode="after")
    def _one_of(self) -> ExpertDrop:
        if (self.experts_kept is None) == (self.fraction_dropped is None):
            raise ValueError("give either experts_kept or fraction_dropped")
        if self.seed and self.criterion != "random":
            raise ValueError(f"seed {self.seed} does nothing: {self.criterion} draws no lots; leave it out")
        return self

    def dropped_of(self, counts: Sequence[int], *, groups: int = 1) -> int:
        """Return how many experts scope global drops in all from layers that hold so many, equally many of each group."""
        if self.experts_kept is not None:
            return max(0, sum(counts) - self.experts_kept * len(counts)) // groups * groups
        assert self.fraction_dropped is not None, "the validator demands one of the two"
        return round(self.fraction_dropped * sum(counts)) // groups * groups


class ExpertMerge(Step):
    """Fold the experts into fewer centroids."""

    step: Literal["expert_merge"] = "expert_merge"
    criterion: Literal["ream"] = "ream"
    experts_kept: Annotated[int, Field(gt=0)]


class LayerDrop(Step):
    """Remove the MoE layers, with their norms, that change their input least."""

    step: Literal["layer_drop"] = "layer_drop"
    layers_dropped: Annotated[int, Field(gt=0)]
    criterion: Literal["cosine"] = "cosine"
    blocks: BlockIndices | None = None

    @model_validator(mode="before")
    @classmethod
    def _count_the_named(cls, data: Any) -> Any:
        return _count_named(data, "layers_dropped")


class BlockDrop(Step):
    """Remove the blocks that change their input least."""

    step: Literal["block_drop"] = "block_drop"
    blocks_dropped: Annotated[int, Field(gt=0)]
    selection: Literal["discrete", "consecutive"] = "discrete"
    blocks: BlockIndices | None = None

    @model_validator(mode="before")
    @classmethod
    def _count_the_named(cls, data: Any) -> Any:
        return _count_named(data, "blocks_dropped")


class ExpertSkip(Step):
    """Skip an expert at run time when its routing weight is far below the first one's."""

    step: Literal["expert_skip"] = "expert_skip"
    beta: Literal["median"] | Annotated[float, Field(ge=0.0, le=1.0)] = "median"


class Recover(Step):
    """Train what compression hurt, block by block."""

    step: Literal["recover"] = "recover"
    method: Literal["router_distill", "block_distill", "lora", "full", "hyper_experts"]
    tokens: Annotated[int, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None


class Analyze(Step):
    """Add the study's tables to the report; change nothing."""

    step: Literal["analyze"] = "analyze"


AnyStep = Annotated[
    Prune | Quantize | ExpertDrop | ExpertMerge | LayerDrop | BlockDrop | ExpertSkip | Recover | Analyze,
    Field(discriminator="step"),
]
STEPS: dict[str, type[Step]] = {
    "prune": Prune,
    "quantize": Quantize,
    "expert_drop": ExpertDrop,
    "expert_merge": ExpertMerge,
    "layer_drop": LayerDrop,
    "block_drop": BlockDrop,
    "expert_skip": ExpertSkip,
    "recover": Recover,
    "analyze": Analyze,
}
_PHASE = {"analyze": 0.0, "expert_skip": 2.5, "prune": 3.0, "quantize": 4.0, "recover": 5.0}
"""Normal form: analyze, trims in the order given (1), expert_drop of scope global (2), expert_skip, prune, quantize, recover.

A global budget is spent last: what a block or a layer weighs would otherwise hang on which of them the study picks.
"""


class Recipe(Settings):
    """An ordered list of steps."""

    steps: Annotated[tuple[AnyStep, ...], Field(min_length=1, max_length=32)]

    def in_normal_form(self) -> Recipe:
        """Return the steps in the order in which they are worked; trims keep the order given."""
        return Recipe(steps=tuple(self.steps[position] for position in self.normal_order()))

    def normal_order(self) -> tuple[int, ...]:
        """Return the positions of the steps in the order in which they are worked."""
        return tuple(sorted(range(len(self.steps)), key=lambda position: _phase(self.steps[position])))


def _phase(step: AnyStep) -> float:
    if isinstance(step, ExpertDrop):
        return 2.0 if step.scope == "global" else 1.0
    return _PHASE.get(step.step, 1.0)


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

    source: TextSource = "default"
    samples: Annotated[int, Field(ge=1, le=2**20)] = 64
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] | None = Field(default=None, description="Default: as calibration.")


class Evaluation(Settings):
    """What is measured on the original and on the artifact."""

    perplexity: Perplexity = Perplexity()
    benchmarks: tuple[str, ...] = ()
    speed: bool = False


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


def step_schema(step: type[Step]) -> dict[str, Any]:
    """Return the JSON Schema of one step's settings."""
    return step.model_json_schema()
