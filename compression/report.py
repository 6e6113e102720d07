"""What did happen: sizes, a ledger row per weight, what became of each block, and what quality it cost.

The report is data. Its worst news comes first in ``lost``, in sentences drawn from the numbers below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, computed_field

from compression.measured import Benchmarks, Generation, NotMeasured, Paired, Quality, Record, Speed
from compression.plan import FrontierPoint, PlanTrial


def _served_alone(*names: str) -> Callable[[dict[str, Any]], None]:
    """Return what makes a schema true of the artifact's report too, which leaves these fields out."""

    def relax(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema.get("required", []) if name not in names]
        for name in names:
            schema["properties"][name]["x-served-alone"] = True

    return relax


class LedgerRow(Record):
    """What was done to one weight."""

    tensor: str
    """Its saved name in the artifact, before packing; with ``[e]`` behind it, expert e's part of a tensor that holds all."""
    scheme: str
    """``keep`` where the weight was pruned and stayed in its own dtype."""
    method_asked: str
    """With pruning and quantization, both, as ``sparsegpt+gptq``."""
    method_used: str
    """``rtn`` or ``magnitude`` in place of a method that the calibration told too little about the weight's inputs."""
    tokens: int | None
    """Calibration tokens that the model itself sent through the weight; None where none were needed."""
    tokens_topped_up: int
    """Further tokens that a starved expert was shown: those the router came nearest to sending."""
    damping: float | None
    """Multiple of the mean diagonal added to the Gram matrix; None where none was used."""
    error_before: float
    """As ``error_after``, had the weight been rounded to nearest, and pruned by magnitude."""
    error_after: float
    """Relative squared error of what ``error_of`` says, over at most 128 evenly spaced outputs."""
    error_of: Literal["outputs", "weights_times_inputs", "weights"]
    """The weight's outputs on the calibration tokens; the same as if its inputs were uncorrelated; or the weight itself."""
    zeros: float
    """Share of the weight's entries that are zero in the artifact."""
    bits: float
    """Bits stored per entry, scales and masks included."""


class BlockRow(Record):
    """What became of one block of the source."""

    index: int
    """In the source."""
    action: Literal["keep", "drop"]
    index_after: int | None
    experts_kept: tuple[int, ...] | None
    """Ids of the source's experts that stay, in their new order; None for a dense or dropped block."""
    experts_before: int | None
    moe_layer: Literal["keep", "drop"] | None = None
    """Whether the MoE layer stays; None for a dense or dropped block. One that is kept may have lost all of its experts."""
    merged: dict[int, tuple[int, ...]] | None = None
    """Of merged experts, by the one that they were folded into: the source's ids, that one's included."""
    skip_beta: float | None = None
    """Beta with which the block skips experts at run time."""
    cosine: float | None
    """Mean cosine between the block's input and output; None when no study was needed."""
    layer_cosine: float | None = None
    """Mean cosine between the residual stream before and after the MoE layer and its norm."""
    expert_tokens: tuple[int, ...] | None
    """Calibration tokens per expert of the source; None when no study was needed."""


class StudyNote(Record):
    """The look at the untouched model that the trims went by."""

    model_config = ConfigDict(json_schema_extra=_served_alone("reused", "seconds"))

    parts: tuple[str, ...]
    tokens: int
    domains: tuple[str, ...]
    reused: bool
    """Whether it was found from an earlier job on the same weights and text, so that no weight was read for it."""
    seconds: dict[str, float]
    """Wall-clock seconds of each part, when it was taken."""


class PlanningNote(Record):
    """How the steps were chosen. Losses are divergences from the original in nats per token, on calibration text."""

    predicted_loss: float
    trials: tuple[PlanTrial, ...]
    """The plans that were tried for real, the predicted best first."""
    frontier: tuple[FrontierPoint, ...]


class ResumeNote(Record):
    """Blocks that an earlier attempt at the same run had finished, and where."""

    blocks: tuple[int, ...]
    """By their index in the artifact."""
    environment: dict[str, str]
    same: bool
    """Whether this run's environment is the same; then every byte is that of a run which was never interrupted."""


class Verification(Record):
    """The proof that the artifact opens and is what was computed."""

    model_config = ConfigDict(json_schema_extra=_served_alone("mode"))

    opened_with: str
    """The stock loader and its version."""
    mode: Literal["whole", "windows"]
    """As a whole, or in windows of blocks where the dense model does not fit into memory."""
    largest_logit_difference: float
    tokens: int
    tensors_scanned: int
    """Tensors checked for non-finite values and, where they are scales, for zeros."""
    rules_of_vllm: Literal["checked on the plan, engine not run", "not followed"] = "checked on the plan, engine not run"
    """``not followed``: the custom profile allows what vLLM does not read."""


class Report(Record):
    """The whole report, as stored and served. The artifact's report.json leaves out what is marked ``x-served-alone``."""

    model_config = ConfigDict(json_schema_extra=_served_alone("seconds", "speed", "peak_memory_bytes", "resumed"))

    schema_version: Literal[1] = 1
    model: str
    revision: str
    profile: str
    steps: tuple[dict[str, Any], ...]
    bytes_before: int
    bytes_after: int
    bytes_planned: int
    target_bytes: int | None
    memory: dict[str, int]
    components: dict[str, int]
    quality: Quality
    benchmarks: Benchmarks | None = None
    generation: Generation | None = None
    speed: Speed | None = None
    not_measured: tuple[NotMeasured, ...] = ()
    """What was asked for and could not be measured."""
    lost: tuple[str, ...]
    warnings: tuple[dict[str, str], ...]
    blocks: tuple[BlockRow, ...]
    ledger: tuple[LedgerRow, ...]
    verification: Verification
    study: StudyNote | None = None
    planning: PlanningNote | None = None
    """How recipe "auto" came to its steps; None for a recipe that was written out."""
    analysis: dict[str, Any] | None = None
    """Tables and findings of the step analyze; None where it was not asked for."""
    calibration: dict[str, Any] | None
    evaluation: dict[str, Any]
    seconds: dict[str, float]
    """Wall-clock seconds per stage."""
    peak_memory_bytes: dict[str, int]
    """Peak resident memory of the process, and peak of the accelerator where there is one."""
    versions: dict[str, str]
    request: dict[str, Any] | None = None
    """As it was accepted, defaults filled in; where long text was given in it, ``left_out`` says how many, with size and hash."""
    resumed: tuple[ResumeNote, ...] = ()

    @computed_field
    @property
    def ratio(self) -> float:
        """Bytes before over bytes after: bigger is better."""
        return self.bytes_before / self.bytes_after

    @computed_field
    @property
    def retention(self) -> float:
        """The worst over everything measured: the whole held-out text, each kind of it, each benchmark."""
        tasks = [] if self.benchmarks is None else [row.retention for row in self.benchmarks.rows]
        texts = [self.quality.retention, *(domain.retention for domain in self.quality.domains)]
        return min([*texts, *(kept for kept in tasks if kept is not None)])

    def for_artifact(self) -> dict[str, Any]:
        """Return the report as it lies in the artifact: without what differs from one run to the next, such as times.

        So equal runs, interrupted or not, leave equal bytes. The whole report is served by the job.
        """
        # How it was opened depends on the memory that happened to be free.
        passing = {"seconds", "speed", "peak_memory_bytes", "resumed"}
        data = self.model_dump(mode="json", exclude={**dict.fromkeys(passing, True), "verification": {"mode"}})
        if data["study"] is not None:
            data["study"] = {name: data["study"][name] for name in ("parts", "tokens", "domains")}
        return data

    def result(self) -> dict[str, Any]:
        """Return the summary that a job shows; the store adds ``manifest_sha256``."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "retention": self.retention,
            "perplexity_before": self.quality.perplexity_before,
            "perplexity_after": self.quality.perplexity_after,
            "divergence": self.quality.divergence,
            "verified": True,
        }


_ERRORS = {"outputs": "a weight's outputs", "weights_times_inputs": "a weight times its inputs", "weights": "a weight"}


class Beside(NamedTuple):
    """What was measured besides perplexity, and what could not be."""

    benchmarks: Benchmarks | None = None
    generation: Generation | None = None
    not_measured: tuple[NotMeasured, ...] = ()


def worst_first(
    quality: Quality, blocks: tuple[BlockRow, ...], ledger: tuple[LedgerRow, ...], *, beside: Beside | None = None
) -> tuple[str, ...]:
    """Return what was lost, in sentences, the worst first."""
    beside = beside or Beside()
    # A stable sort: what was kept alike stays in this order.
    news = [text for _, text in sorted(_of_measures(quality, beside.benchmarks), key=lambda kept: kept[0])]
    news += _of_generation(beside.generation)
    news += [f"{note.what.replace('_', ' ').capitalize()} could not be measured: {note.reason}." for note in beside.not_measured]
    if dropped := [row.index for row in blocks if row.action == "drop"]:
        news.append(f"{len(dropped)} of {len(blocks)} blocks are gone: {_listed(dropped)}.")
    if (random := quality.random_drop) is not None and random.loss <= quality.loss_after:
        news.append(
            f"Experts drawn by lot would have kept as much: perplexity {random.perplexity:.2f} with seed {random.seed}, "
            "no weight slimmed."
        )
    if layers := [row.index for row in blocks if row.moe_layer == "drop"]:
        news.append(f"{len(layers)} blocks have lost their MoE layer: {_listed(layers)}.")
    news += _of_experts(blocks)
    news += _of_ledger(ledger)
    return tuple(news)


def _of_measures(quality: Quality, benchmarks: Benchmarks | None) -> Iterator[tuple[float, str]]:
    """Yield the retention and a sentence of the whole text, of the worst kind of text and of the worst benchmark."""
    yield (
        quality.retention,
        f"Perplexity went from {quality.perplexity_before:.2f} to {quality.perplexity_after:.2f} ({_change(quality)}) on "
        f"{quality.tokens} held-out tokens; the next token differs for {1 - quality.top1_agreement:.1%} of them.",
    )
    if len(quality.domains) > 1:
        worst = quality.domains[0]
        yield (
            worst.retention,
            f"Worst on text of the kind {worst.name!r}: perplexity went from {worst.perplexity_before:.2f} to "
            f"{worst.perplexity_after:.2f} ({_change(worst)}) on {worst.tokens} tokens.",
        )
    kept = [(row.retention, row) for row in (benchmarks.rows if benchmarks is not None else ()) if row.retention is not None]
    if kept and kept[0][0] < 1:
        retention, row = kept[0]
        chance = "" if row.chance is None else f" where guessing scores {row.chance:.4f}"
        yield (
            retention,
            f"Worst of {len({row.task for _, row in kept})} benchmarks: {row.task} ({row.metric}) went from {row.before:.4f} to "
            f"{row.after:.4f}{chance}; {max(0.0, retention):.1%} of the lead is kept.",
        )


def _change(paired: Paired) -> str:
    return f"{paired.perplexity_after / paired.perplexity_before - 1:+.1%}"


def _of_generation(generation: Generation | None) -> list[str]:
    news: list[str] = []
    if generation is None:
        return news
    before, after = generation.before, generation.after
    if before.exact_match is not None and after.exact_match is not None and after.exact_match < before.exact_match:
        news.append(f"Answers as expected went from {before.exact_match:.1%} to {after.exact_match:.1%} of the prompts that say.")
    if after.repetition > before.repetition:
        news.append(
            f"It repeats itself more: {after.repetition:.1%} of the 4-grams in what it writes stood there before, "
            f"{before.repetition:.1%} with the original."
        )
    return news


def _of_experts(blocks: tuple[BlockRow, ...]) -> list[str]:
    news: list[str] = []
    kept = [row for row in blocks if row.experts_kept is not None and row.experts_before]
    folded = sum(len(group) - 1 for row in kept for group in (row.merged or {}).values())
    if gone := sum((row.experts_before or 0) - len(row.experts_kept or ()) for row in kept) - folded:
        news.append(f"{gone} experts are gone from the MoE layers that stay.")
    if folded:
        news.append(f"{folded} experts were folded into others.")
    if empty := [row.index for row in kept if not row.experts_kept]:
        news.append(f"{len(empty)} MoE layers have lost all of their experts: {_listed(empty)}.")
    if skipping := [row for row in blocks if row.skip_beta is not None]:
        news.append(f"{len(skipping)} MoE layers skip experts at run time.")
    return news


def _of_ledger(ledger: tuple[LedgerRow, ...]) -> list[str]:
    news: list[str] = []
    if plain := [row for row in ledger if row.method_used != row.method_asked]:
        names = _listed([row.tensor for row in plain])
        ways = " and ".join(sorted({row.method_used for row in plain}))
        news.append(
            f"{len(plain)} of {len(ledger)} weights had too little calibration to go by and were slimmed by {ways}: {names}."
        )
    if experts := list(dict.fromkeys(_owner(row.tensor) for row in ledger if row.tokens == 0)):
        news.append(f"{len(experts)} experts or layers saw no calibration token of their own: {_listed(experts)}.")
    if starved := [row for row in ledger if row.tokens_topped_up and row.tokens]:
        news.append(f"{len(starved)} weights of starved experts were topped up with tokens that the router nearly sent them.")
    if ledger:
        worst = max(ledger, key=lambda row: row.error_after)
        news.append(f"The largest relative error of {_ERRORS[worst.error_of]} is {worst.error_after:.2%}, in {worst.tensor}.")
    return news


def _owner(tensor: str) -> str:
    """Return the expert or layer that a ledger row's tensor is a matrix of."""
    stem, of_all, expert = tensor.partition("[")
    return f"{stem.rsplit('.', 1)[0]}.{expert.removesuffix(']')}" if of_all else stem.rsplit(".", 2)[0]


def _listed(items: list[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:8])
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"
