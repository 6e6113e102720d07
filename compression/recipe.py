"""What can be done to a model: one class per step, and the Recipe as their ordered list.

Every setting carries its limits and refuses what it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from compression.architectures import Component

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


def step_schema(step: type[Step]) -> dict[str, Any]:
    """Return the JSON Schema of one step's settings."""
    return step.model_json_schema()
