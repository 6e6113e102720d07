"""What was measured of two models side by side: original and artifact, in the same run, engine and batch.

Every figure that a page, a card or a summary shows is a field of these records or of ``report.py``'s.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

Which = Literal["original", "artifact", "quantized only", "random drop"]
"""A model that was measured. ``quantized only``: the artifact's recipe without its trims."""


class Record(BaseModel):
    """Frozen data; unknown names are our own mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Paired(Record):
    """Losses of two models on the same tokens, in nats per token."""

    tokens: int
    loss_before: float
    loss_after: float
    divergence: float
    """Mean KL divergence of the artifact's next-token distribution from the original's."""
    top1_agreement: float
    """Share of tokens on which both predict the same next token."""

    @computed_field
    @property
    def perplexity_before(self) -> float:
        """Perplexity of the original."""
        return math.exp(self.loss_before)

    @computed_field
    @property
    def perplexity_after(self) -> float:
        """Perplexity of the artifact."""
        return math.exp(self.loss_after)

    @computed_field
    @property
    def retention(self) -> float:
        """exp(loss before - loss after): 1 means nothing was lost."""
        return math.exp(self.loss_before - self.loss_after)


class DomainQuality(Paired):
    """One kind of text."""

    name: str


class Baseline(Record):
    """Another way to the same size, on the same held-out tokens."""

    loss: float
    divergence: float
    top1_agreement: float

    @computed_field
    @property
    def perplexity(self) -> float:
        """Perplexity of the model made that way."""
        return math.exp(self.loss)


class RandomDrop(Baseline):
    """The same trims, but with experts drawn by lot; weights as they were, none slimmed."""

    criterion: Literal["random"] = "random"
    seed: int


class QuantizedOnly(Baseline):
    """The same quantization, but nothing trimmed: what the trims alone have cost."""

    bytes: int
    """Of its tensors; it is bigger than the artifact."""


class Quality(Paired):
    """Original and artifact on all held-out tokens, per kind of text, and beside other ways to the same size."""

    domains: tuple[DomainQuality, ...] = ()
    """The worst retention first."""
    random_drop: RandomDrop | None = None
    """None where the recipe chooses no experts."""
    quantized_only: QuantizedOnly | None = None
    """None where the recipe does not both trim and quantize."""

    @computed_field
    @property
    def worst_domain(self) -> str | None:
        """Name of the domain with the worst retention."""
        return self.domains[0].name if self.domains else None


class BenchmarkRow(Record):
    """One task and metric of lm-evaluation-harness."""

    task: str
    metric: str
    """As the harness names it, its filter included: ``acc,none``."""
    task_version: str
    higher_is_better: bool
    samples: int
    few_shots: int
    before: float
    after: float
    stderr_before: float | None
    stderr_after: float | None
    chance: float | None
    """What guessing scores; None where the task gives no way to know."""

    @computed_field
    @property
    def retention(self) -> float | None:
        """Chance-adjusted: (after - chance) / (before - chance); None where the original is no better than chance.

        No better: by no more than one standard error, or a quotient of two noises could be the report's worst news.
        For a metric of which less is better: before / after.
        """
        if not self.higher_is_better:
            return self.before / self.after if self.after > 0 else None
        floor = self.chance or 0.0
        lead = self.before - floor
        return (self.after - floor) / lead if lead > (self.stderr_before or 0.0) else None

    @computed_field
    @property
    def raw_retention(self) -> float | None:
        """After / before, chance left in."""
        return self.after / self.before if self.before > 0 else None


class Benchmarks(Record):
    """Tasks of lm-evaluation-harness on both models; the worst retention first."""

    rows: tuple[BenchmarkRow, ...]
    harness: str
    """Its version."""
    batch_size: int
    limit: int | None
    """Samples per task at most."""
    tasks_hash: str | None
    """sha256 over the folder of own tasks."""
    command: str
    """The harness's own command line that gives the artifact's figures."""


class GenerationSide(Record):
    """What one model wrote, over all prompts."""

    length: float
    """Mean tokens written before it stopped."""
    repetition: float
    """Share of 4-grams of tokens that the same answer had before; 0 where nothing repeats."""
    exact_match: float | None
    """Share of prompts answered as expected; None where no prompt says what is expected."""


class GenerationSample(Record):
    """One prompt and what both models wrote."""

    prompt: str
    expected: str | None
    before: str
    after: str


class Generation(Record):
    """Greedy continuations of a set of prompts by both models."""

    prompts: int
    new_tokens: int
    """At most, per prompt."""
    agreement: float
    """Share of prompts that both continue with the same tokens to the end."""
    before: GenerationSide
    after: GenerationSide
    samples: tuple[GenerationSample, ...]
    """A few, those that differ first."""
    source: dict[str, Any]
    """Where the prompts come from, with a content hash."""


class SpeedPoint(Record):
    """One model at one batch size, measured in a process of its own. Times in seconds, rates over the whole batch."""

    model: Which
    batch_size: int
    context_tokens: int
    new_tokens: int
    rounds: int
    prefill_tokens_per_s: float
    prefill_p50_s: float
    prefill_p99_s: float
    decode_tokens_per_s: float
    step_p50_s: float
    """Of one decoding step."""
    step_p99_s: float
    weights_bytes: int
    """Of parameters and buffers, as they lie in memory once the model is open."""
    kv_bytes: int
    """Of the cache at the end of a round."""
    peak_bytes: int
    """The most that was in use: of the accelerator where there is one, else of the process."""


class Speed(Record):
    """Prefill and decode of both models in the same engine."""

    engine: str
    """Which, with its version."""
    device: str
    threads: int
    dtype: str
    points: tuple[SpeedPoint, ...]


class NotMeasured(Record):
    """Something that was asked for and could not be measured, and why."""

    what: Literal["benchmarks", "generation", "speed", "quantized_only"]
    reason: str
