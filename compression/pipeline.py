"""compress(): study, plan, compress, evaluate, verify. The table of contents."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from compression.architectures import Architecture, find_architecture
from compression.auto import Pricing, parts_to_study, pricing_text, settled
from compression.block import Shell, dtype_of
from compression.calibration import TokenSet, load_calibration, load_evaluation, refuse_overlap
from compression.card import model_card
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantized_entries
from compression.checkpoint.source import open_source
from compression.checkpoint.writer import Writer, sparse_config, write_json
from compression.companions import check_generation_config, check_token_ids
from compression.compress import Compressor
from compression.errors import ConstraintViolated, VerificationFailed
from compression.evaluation.run import Measured, evaluate, prepare
from compression.evaluation.verification import verify
from compression.measured import NotMeasured
from compression.memory import bound_kernel_caches
from compression.methods import Choice, choose_cuts, merger, parts_for
from compression.observer import Observer, weigh
from compression.page.report_page import report_page
from compression.plan import Plan, make_plan
from compression.planner.inventory import take_inventory
from compression.planner.known import remember
from compression.planner.sizes import packed_pattern
from compression.planner.trims import least_experts
from compression.progress import Listener, Progress, Silent, Stage
from compression.recipe import AnyStep, LayerDrop, Prune, Quantize, Recipe
from compression.report import LedgerRow, Report, Verification
from compression.reporting import environment_of, report_of
from compression.request import Compression, Prompt
from compression.resume import FinishedBlocks, fingerprint_of
from compression.shelf import Shelf
from compression.slim import Slimming
from compression.study import Study
from compression.study_store import StudyStore
from compression.sweep import Stream, sweep, working_dtype
from compression.trimming import Cuts, Routing
from compression.trimming.dense_layers import stock_layer_drop, zero_dense_width
from compression.trimming.routers import Routers
from compression.trimming.view import TrimmedReader

_WRITTEN_OUT: dict[Stage, float] = {"planning": 1, "studying": 15}
"""Shares of the stages before compressing, for a recipe that is written out."""
_WITNESS_TOKENS = 512
"""Tokens that the artifact must compute, opened again, as it did when it was made."""


def compress(
    request: Compression,
    model: Path,
    out: Path,
    listener: Listener | None = None,
    *,
    host_memory: int | None = None,
    studies: Path | None = None,
    shelf: Shelf | None = None,
    tasks: Path | None = None,
) -> Report:
    """Compress the checkpoint in folder ``model`` into folder ``out`` as the request asks, and report what was lost.

    ``host_memory``: bytes that this run may plan with; what is free when it is not given. ``studies``: folder in which studies
    are kept and found again; without one, every run looks at the untouched model anew. ``shelf``: where finished blocks outlive
    this run, and from where those of an earlier attempt are taken. ``tasks``: a folder of benchmarks, which may run code.
    Raises RequestError for what can never succeed, RunError for what went wrong, Stopped when the listener asked.
    """
    bound_kernel_caches()
    memory = host_memory or psutil.virtual_memory().available
    kept = {"studies": studies, "shelf": shelf, "tasks": tasks}
    run = Run(request, open_source(model, _device()), out, listener or Silent(), memory, **kept)
    with run.stage("resolving" if run.is_open else "planning"):
        run.plan_and_load_text()
    with run.stage("studying"):
        run.study_model()
    if run.is_open and run.steps:
        with run.stage("planning"):
            run.settle_plan()
    run.choose()
    with run.stage("compressing"):
        run.compress_blocks()
    with run.stage("evaluating"):
        run.evaluate()
    with run.stage("verifying"):
        run.verify()
    report = report_of(run)
    write_json(out / "report.json", report.for_artifact())
    (out / "report.html").write_text(report_page(report.for_artifact()), encoding="utf-8")
    (out / "README.md").write_text(model_card(report), encoding="utf-8")
    run.refuse_violations(report)
    return report


@dataclass
class Run:
    """What the stages of one run hand to each other."""

    request: Compression
    reader: Reader
    out: Path
    listener: Listener
    host_memory: int
    device: torch.device = field(default_factory=lambda: _device())
    seconds: dict[str, float] = field(default_factory=dict)
    studies: Path | None = None
    shelf: Shelf | None = None
    study: Study | None = None
    study_reused: bool = False
    tasks: Path | None = None
    warnings: list[dict[str, str]] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    prompts: tuple[list[Prompt], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.architecture: Architecture = find_architecture(self.reader.config)
        self.is_open = not isinstance(self.request.recipe, Recipe)
        before: dict[Stage, float] = {"resolving": 1, "studying": 60, "planning": 15} if self.is_open else _WRITTEN_OUT
        self.progress = Progress(self.listener, {**before, "compressing": 50, "evaluating": 25, "verifying": 9})

    @contextmanager
    def stage(self, name: Stage) -> Generator[None]:
        """Announce a stage and take its time."""
        self.progress.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def plan_and_load_text(self) -> None:
        """Resolve the recipe against the headers; read the text that it is calibrated and judged on."""
        self.inventory = take_inventory(self.reader.checkpoint)
        self.follow(make_plan(self.request, self.reader.checkpoint))
        if self.is_open and self.steps:
            self.parts = parts_to_study(self.inventory)
        settings = self.request.calibration
        folder = self.reader.folder
        needed = bool(self.parts - {"weights"}) or self.slimming.needs != "nothing" or (self.is_open and bool(self.steps))
        self.calibration: TokenSet | None = load_calibration(settings, folder) if needed else None
        length = self.request.evaluation.perplexity.sequence_length or settings.sequence_length
        self.evaluation: TokenSet = load_evaluation(self.request.evaluation.perplexity, folder, sequence_length=length)
        if self.calibration is not None:
            refuse_overlap(self.calibration, self.evaluation)
        vocabulary = self.reader.dense.tensors[f"{self.architecture.embedding}.weight"].shape[0]
        check_generation_config(folder)
        for text in (self.calibration, self.evaluation):
            for ids in (text.ids_NS, text.spare_NS) if text is not None else ():
                check_token_ids(ids, vocabulary)
            for note in text.description["warnings"] if text is not None else []:
                self.warn("text", note)
        for warning in self.plan.warnings if not self.plan.provisional else ():
            self.warn(warning.code, warning.message)
        prepare(self)

    def follow(self, plan: Plan) -> None:
        """Take the plan's steps as those of this run."""
        self.plan = plan
        self.steps: tuple[AnyStep, ...] = Recipe.model_validate({"steps": plan.steps}).steps if plan.steps else ()
        self.quantize = next((step for step in self.steps if isinstance(step, Quantize)), None)
        self.parts = parts_for(self.steps)
        self.slimming = Slimming(
            next((step for step in self.steps if isinstance(step, Prune)), None),
            self.quantize,
            packed_pattern(self.steps, self.request.profile, self.architecture),
        )

    def warn(self, code: str, message: str) -> None:
        """Say it at once, and keep it for the report."""
        self.warnings.append({"code": code, "message": message})
        self.progress.warn(code, message)

    def study_model(self) -> None:
        """Look at the untouched model once, unless that was done before."""
        blocks = range(self.architecture.block_count(self.reader.config))
        mixtures = [b for b in blocks if self.architecture.router_name(b) in self.reader.dense.tensors]
        experts = {b: self.reader.dense.tensors[self.architecture.router_name(b)].shape[0] for b in mixtures}
        self.whole = Cuts(tuple(blocks), {b: tuple(range(experts[b])) for b in mixtures})
        self.choice = self._choice()
        if self.parts:
            self.study = self._found_study() or self._new_study()

    def settle_plan(self) -> None:
        """Find the plan that recipe "auto" comes to, and follow it from here on."""
        assert self.study is not None, "recipe auto studies the model"
        plan, prices = settled(self.request, self._pricing(), self.study, self.whole, self.choice, self.progress.block)
        if prices != self.study.prices:
            self.study.prices = prices
            self._keep_study()
        if self.studies is not None:
            remember(self.studies, self.request, self.reader.checkpoint, prices)
        self.follow(plan)
        self.progress.settled(plan.model_dump(mode="json"))
        if note := self._pricing().text.note:
            self.warn("priced_on_samples", note)
        for warning in plan.warnings:
            self.warn(warning.code, warning.message)

    def choose(self) -> None:
        """Decide what goes."""
        self.choice = self._choice()
        self.cuts = choose_cuts(self.steps, self.study, self.whole, self.choice)

    def _pricing(self) -> Pricing:
        assert self.calibration is not None, "recipe auto reads calibration text"
        width = self.architecture.settings(self.reader.config)["hidden_size"]
        stream = 4 * width * pricing_text(self.calibration).priced_NS.numel()
        return Pricing(self.reader, self.inventory, self.calibration, self.device, max(8, self.host_memory // 4 // stream))

    def _found_study(self) -> Study | None:
        if self.studies is None or self.calibration is None:
            return None
        store, known_by = StudyStore(self.studies), (self.reader, self.calibration.content_hash)
        dtype = working_dtype(self.device, dtype_of(self.reader.config))
        found = store.find(*known_by, self.parts, dtype)
        if found is None and self.shelf is not None:
            key = store.key(*known_by, dtype)
            for content, files in self.shelf.find(key).items():
                store.adopt(key, content, files)
            found = store.find(*known_by, self.parts, dtype)
        if found is not None and "prices" in self.parts and not self._pricing().is_of(found.prices):
            found = None
        self.study_reused = found is not None
        return found

    def _new_study(self) -> Study:
        shell = Shell(self.reader.config, self.reader.outside(), self.device)
        if self.calibration is None or self.parts == {"weights"}:
            return weigh(shell, self.reader, self.architecture, self.progress.block)
        self.reader.hashing = self.studies is not None
        if "prices" in self.parts:
            study = self._pricing().measured_study(self.parts, self.choice.routing, self.progress.block)
        else:
            calibration, dtype = self.calibration, working_dtype(self.device, shell.dtype)
            observer = Observer(self.architecture, calibration.domains, calibration.domain_N, self.parts)
            sweep(shell, self.reader, Stream(shell, calibration.ids_NS, dtype=dtype), observer, self.progress.block)
            study = observer.study
        self.study = study
        self._keep_study()
        return study

    def _keep_study(self) -> None:
        if self.studies is None or self.study is None or self.calibration is None:
            return
        store, dtype = StudyStore(self.studies), working_dtype(self.device, dtype_of(self.reader.config))
        place = store.keep(self.study, self.reader, self.calibration.content_hash, dtype)
        if self.shelf is not None:
            # Copies: another job may replace the study while these are on their way.
            files = {path.name: Path(shutil.copy(path, self.shelf.folder)) for path in place.iterdir()}
            self.shelf.keep(store.key(self.reader, self.calibration.content_hash, dtype), place.name, files)

    def _choice(self) -> Choice:
        inventory = self.inventory
        routing = Routing(
            experts=inventory.experts,
            top_k=inventory.top_k,
            groups=inventory.groups,
            least_per_group=least_experts(inventory) // inventory.groups,
            router=Routers(self.reader.config),
        )
        candidates = frozenset(row.index for row in self.plan.blocks if row.action == "keep_or_drop")
        settings = self.architecture.settings(self.reader.config)
        spelling = stock_layer_drop(self.architecture, settings) if self.plan.profile == "portable" else None
        return Choice(candidates, routing, prefix=spelling == "prefix")

    def compress_blocks(self) -> None:
        """Write the artifact, block by block, and check it against the plan."""
        trimmed = self.trimmed(self.cuts)
        config = dict(trimmed.config)
        if self.quantize is not None:
            config |= quantized_entries(self.architecture, self.quantize, trimmed.config, self.cuts.blocks)
        if self.slimming.packed is not None:
            config |= sparse_config(self.slimming.packed, config)
        self.finished = self._finished_blocks(config)
        writer = Writer(self.out, config)
        try:
            self._write_blocks(writer, trimmed, config)
            writer.finish(self.reader.folder)
        finally:
            writer.close()
        self.bytes_after = writer.bytes

    def _finished_blocks(self, config: dict[str, Any]) -> FinishedBlocks:
        """Return what earlier attempts at the same artifact left, and tell of it."""
        fingerprint = ""
        if self.shelf is not None:
            fingerprint = fingerprint_of(
                content=self.reader.content(),
                calibration=None if self.calibration is None else self.calibration.content_hash,
                config=config,
                steps=self.plan.steps,
                cuts=self.cuts,
                zero_width=self._zero_width(),
            )
        finished = FinishedBlocks(self.shelf, fingerprint, environment_of(self.device))
        for note in finished.notes():
            if not note.same:
                where = ", ".join(f"{name} {version}" for name, version in note.environment.items())
                self.warn("mixed_environments", f"{len(note.blocks)} blocks were made by an earlier attempt with {where}")
        return finished

    def trimmed(self, cuts: Cuts) -> TrimmedReader:
        """Return the original with these cuts made, as it is read."""
        merge = merger(self.architecture, cuts, self.study)
        return TrimmedReader(self.reader, self.architecture, cuts, zero_width=self._zero_width(), merge=merge)

    def _zero_width(self) -> int | None:
        """Return the width of the dense layers of zeros that stand for dropped MoE layers; None where nothing does."""
        if self.plan.profile != "portable" or not any(isinstance(step, LayerDrop) for step in self.steps):
            return None
        settings, parallel = self.architecture.settings(self.reader.config), self.request.serving.tensor_parallel
        return zero_dense_width(self.architecture, settings, self.whole.blocks, tensor_parallel=parallel)

    def _write_blocks(self, writer: Writer, trimmed: TrimmedReader, config: dict[str, Any]) -> None:
        outside = trimmed.outside()
        writer.outside(outside)
        shell = Shell(trimmed.config, outside, self.device)
        artifact = shell if config == trimmed.config else Shell(config, outside, self.device)
        calibration = None
        if self.calibration is not None and self.slimming.needs != "nothing":
            calibration = Stream(artifact, self.calibration.ids_NS, dtype=working_dtype(self.device, artifact.dtype))
        witness_NS = (self.calibration or self.evaluation).ids_NS[:1, :_WITNESS_TOKENS]
        witness = Stream(artifact, witness_NS)
        compressor = Compressor(self.architecture, self.slimming, shell, artifact, writer, calibration, witness, self.finished)
        self.ledger: list[LedgerRow] = compressor.run(trimmed, self.progress.block)
        self.ids_BS, self.logits_BSV = witness.ids[0], next(witness.logits(artifact))

    def evaluate(self) -> None:
        """Measure original and artifact side by side."""
        self.measured: Measured = evaluate(self)

    def verify(self) -> None:
        """Prove that the artifact opens, is what was computed, and is as big as was planned."""
        planned = sum(self.plan.components[part] for part in self.plan.components if part not in ("kv_cache", "overhead"))
        if self.bytes_after != planned:
            raise VerificationFailed(f"the artifact has {self.bytes_after} bytes of tensors where the plan promised {planned}")
        self.bytes_planned = planned
        self.verification: Verification = verify(
            self.out,
            self.architecture,
            ids_BS=self.ids_BS,
            logits_BSV=self.logits_BSV,
            whole=self.plan.memory["transformers"] < self.host_memory // 3,
            on_block=self.progress.block,
        )
        if self.plan.profile == "custom":
            self.verification = self.verification.model_copy(update={"rules_of_vllm": "not followed"})

    def refuse_violations(self, report: Report) -> None:
        """Raise ConstraintViolated when the artifact is worse than the request accepts."""
        wanted, retention = self.request.constraints.min_retention, report.retention
        if wanted is not None and retention < wanted and self.request.constraints.on_violation == "fail":
            raise ConstraintViolated(
                f"retention is {retention:.4f}, below min_retention {wanted}; ask for more memory, a gentler recipe, "
                'or set on_violation to "report"'
            )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
