"""A trained model as a job of recipe "auto" knows it, and what plans really cost it.

Plans are evaluated on held-out text, which neither prices nor trials have seen. Many go through the model in one sweep: every
block is read once, each of its settings is solved once by GPTQ, with Gram matrices of the calibration tokens in the untouched
model, and every plan takes from these weights what it wants. A job that writes an artifact calibrates each block on what the
compressed blocks before it put out, which serves the artifact better; ``--artifacts`` of the benches shows by how much.

Shapes: N sequences, S tokens each.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.altered import rounded_to, slimmed_experts, slimmed_linears
from compression.auto import Pricing, settled
from compression.block import Shell
from compression.checkpoint.source import open_source
from compression.collect import collect
from compression.evaluation.perplexity import compare
from compression.linears import find_linears
from compression.methods import choose_cuts
from compression.moe import moe_layer
from compression.pipeline import Run
from compression.plan import Plan, bytes_with_serving
from compression.planner.inventory import take_inventory
from compression.planner.levers import levers_of
from compression.planner.prices import LEVERS, Lever, Prices
from compression.planner.resolve import Resolved, resolve
from compression.planner.search import Search
from compression.progress import Silent
from compression.recipe import AnyStep, Profile, Quantize, Recipe
from compression.request import Compression, Serving
from compression.slimming.hessian import Gram
from compression.sweep import Stream, working_dtype
from compression.trimming import Cuts
from compression.tryout import Trial, carried

SAMPLES, LENGTH = 64, 256
"""Calibration windows, and tokens in every window of either text."""


class Cost(NamedTuple):
    """What a plan was found to cost, sequence by sequence: all [N]."""

    losses: Tensor
    """Of the next token, in nats."""
    divergences: Tensor
    """From the original, in nats per token."""

    @property
    def perplexity(self) -> float:
        """Of all sequences; they are of one length."""
        return math.exp(float(self.losses.mean()))

    @property
    def divergence(self) -> float:
        """The mean of them."""
        return float(self.divergences.mean())


@dataclass(frozen=True)
class Chosen:
    """A recipe, and what became of it on this model."""

    steps: tuple[AnyStep, ...]
    bytes: int
    trial: Trial
    plan: Plan | None = None
    """Of recipe "auto" alone."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what every bench of plans is told."""
    parser.add_argument("--studies", type=Path, default=Path(".bench/studies"), help="where studies are kept and found again")
    parser.add_argument("--windows", type=int, default=32, help=f"held-out windows of {LENGTH} tokens for evaluation")
    parser.add_argument("--out", type=Path, default=Path(".bench/plans"), help="what to call the results, without .json or .svg")


class Planned:
    """One model with its study, prices and texts."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.folder, self._text, self._studies = given.model.resolve(), given.text.resolve(), given.studies
        self._windows = given.windows
        given.out.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        reader = open_source(self.folder)
        self.inventory = take_inventory(reader.checkpoint)
        self.bytes = self.inventory.bytes
        blocks = len(self.inventory.blocks)
        self.name = f"{self.inventory.config['model_type']}, {blocks} blocks of {self.inventory.experts} experts"
        anything = self.request(target=self.bytes // 2, profile="custom")
        self._run = Run(anything, reader, Path(), Silent(), 8 * 2**30, studies=self._studies)
        self._study()
        self.seconds = time.perf_counter() - start
        """What it took to find the study, or to make it."""
        assert self._run.study is not None
        assert self._run.study.prices is not None
        assert self._run.calibration is not None
        self.calibration = self._run.calibration
        self.prices = self._run.study.prices
        self.levers = levers_of(self.inventory)
        self.whole = self._run.whole
        self._choice = replace(self._run.choice, blocks=frozenset(self.inventory.droppable))

    def request(self, *, target: int | None, profile: Profile, steps: Sequence[AnyStep] | None = None) -> Compression:
        """Return a job for this model and its texts."""
        calibration, held_out = ((self._text / name).as_uri() for name in ("calibration.txt", "heldout.txt"))
        request: dict[str, Any] = {
            "model": self.folder.as_uri(),
            "profile": profile,
            "target_memory": target,
            "recipe": "auto" if steps is None else {"steps": [step.model_dump(mode="json") for step in steps]},
            "calibration": {"source": calibration, "samples": SAMPLES, "sequence_length": LENGTH},
            "evaluation": {"perplexity": {"source": held_out, "samples": self._windows, "sequence_length": LENGTH}},
        }
        return Compression.model_validate(request)

    def auto(self, target: int, profile: Profile) -> Chosen:
        """Return what recipe "auto" comes to, trials on calibration text and all."""
        assert self._run.study is not None
        request = self.request(target=target, profile=profile)
        plan, prices = settled(request, self._pricing, self._run.study, self.whole, self._choice, lambda *_: None)
        self._run.study.prices = self.prices = prices
        chosen = self.written_out(Recipe.model_validate({"steps": plan.steps}).steps, profile)
        assert chosen.bytes == plan.bytes_after, "the plan and its steps agree about bytes"
        return replace(chosen, plan=plan)

    def written_out(self, steps: Sequence[AnyStep], profile: Profile) -> Chosen:
        """Return what a recipe comes to; a RequestError where the profile or the model does not allow it."""
        resolved = self._resolved(steps, profile)
        cuts = choose_cuts(resolved.steps, self._run.study, self.whole, self._choice)
        quantize = next((step for step in resolved.steps if isinstance(step, Quantize)), None)
        schemes = {} if quantize is None else {block: self._schemes(quantize, block) for block in cuts.blocks}
        return Chosen(resolved.steps, bytes_with_serving(self.inventory, resolved.cut, Serving()), Trial(cuts, schemes))

    def bytes_of(self, steps: Sequence[AnyStep], profile: Profile) -> int:
        """Return the bytes that a recipe comes to, without choosing anything."""
        return bytes_with_serving(self.inventory, self._resolved(steps, profile).cut, Serving())

    def search(self, profile: Profile, prices: Prices | None = None) -> Search:
        """Return the search over all plans, by this model's prices or by others."""
        return Search(self.inventory, Serving(), profile, prices or self.prices)

    def drops_of(self, cuts: Cuts) -> int:
        """Return how many blocks and MoE layers are gone."""
        return len(self.inventory.blocks) - len(cuts.blocks) + len(cuts.layers_dropped)

    def costs(self, trials: Sequence[Trial], ids_NS: Tensor | None = None) -> tuple[Cost, list[Cost]]:
        """Return what the original and these plans are found to cost, on held-out text if no other is given."""
        reader = open_source(self.folder)
        shell, dtype = self._shell(), working_dtype(self._run.device, self._shell().dtype)
        solved = _Solved(self, Stream(self._shell(), self.calibration.ids_NS, dtype=dtype))
        clean = Stream(shell, self._run.evaluation.ids_NS if ids_NS is None else ids_NS, dtype=dtype)
        streams = carried(shell, reader, clean, trials, solved, lambda done, of, _: print(f"block {done} of {of}", flush=True))
        found = [_compared(shell, clean, stream) for stream in (clean, *streams.values())]
        return found[0], found[1:]

    def _study(self) -> None:
        self._run.plan_and_load_text()
        self._run.study_model()

    def _resolved(self, steps: Sequence[AnyStep], profile: Profile) -> Resolved:
        return resolve(Recipe(steps=tuple(steps)), Serving(), self.inventory, profile=profile)

    def _shell(self) -> Shell:
        return Shell(self._run.reader.config, self._run.reader.outside(), self._run.device)

    def _schemes(self, step: Quantize, block: int) -> Mapping[Lever, str]:
        is_mixture = self.inventory.blocks[block].is_mixture
        others = "shared_experts" if is_mixture else "dense"
        named = {"experts": step.scheme_in(block, "experts") if is_mixture else "keep"}
        named |= {"attention": step.scheme_in(block, "attention"), "others": step.scheme_in(block, others)}
        return {lever: named[lever] for lever in LEVERS if named[lever] != "keep" and self.levers.components.get(lever)}

    @property
    def _pricing(self) -> Pricing:
        return self._run._pricing()


class _Solved:
    """Each block's weights by every scheme, solved once, when the first plan asks for the block."""

    def __init__(self, model: Planned, calibration: Stream) -> None:
        self._reader = open_source(model.folder)
        self._shell = Shell(self._reader.config, self._reader.outside(), calibration.device)
        self._levers, self._calibration, self._at = model.levers, calibration, -1
        self._experts: dict[str, dict[str, Tensor]] = {}
        self._linears: dict[tuple[Lever, str], dict[str, Tensor]] = {}

    def __call__(self, block: nn.Module, cut: Mapping[str, Tensor], index: int, plan: Trial) -> None:
        """Give a live block the solved weights that a plan wants."""
        while self._at < index:
            self._solve(self._at + 1)
        layer = moe_layer(self._reader.architecture, block)
        for lever, scheme in plan.schemes.get(index, {}).items():
            if lever == "experts":
                if layer is not None:
                    for name, stack_EOI in self._experts[scheme].items():
                        layer.stack(name, range(layer.count)).copy_(stack_EOI[list(plan.cuts.experts[index])])
                continue
            for name, linear in find_linears(cut, block, self._reader.architecture, self._levers.components[lever]).items():
                linear.weight.data = self._linears[lever, scheme][self._reader.architecture.place_of(name + ".weight")]

    def _solve(self, index: int) -> None:
        self._at, architecture, stored = index, self._reader.architecture, self._calibration.stored
        self._experts.clear()
        self._linears.clear()
        saved = self._reader.block(index)
        with self._shell.live(index, saved) as block:
            self._calibration.convert_(block)
            parts = [part for parts in self._levers.components.values() for part in parts]
            linears = find_linears(saved, block, architecture, parts)
            collected = collect(index, block, self._calibration, linears, new=Gram, architecture=architecture, advance=False)
            layer = moe_layer(architecture, block)
            for lever, schemes in self._levers.schemes.items():
                of_lever = find_linears(saved, block, architecture, self._levers.components[lever])
                for scheme in schemes:
                    treatment = rounded_to(scheme, self._levers.group_size, "gptq")
                    if lever != "experts":
                        with slimmed_linears(of_lever, treatment, collected, stored):
                            self._linears[lever, scheme] = {
                                architecture.place_of(name + ".weight"): linear.weight.data for name, linear in of_lever.items()
                            }
                    elif layer is not None:
                        everyone = range(layer.count)
                        with slimmed_experts(layer, treatment, collected.routed, stored):
                            stacks = {name: layer.stack(name, everyone).clone() for name in ("gate_up_proj", "down_proj")}
                        self._experts[scheme] = stacks
            self._calibration.push(index, block)


@torch.no_grad()
def _compared(shell: Shell, clean: Stream, other: Stream) -> Cost:
    rows: list[Tensor] = []
    for ids_BS, right_BSV, logits_BSV in zip(clean.ids, clean.logits(shell), other.logits(shell), strict=True):
        rows += [
            compare(ids_S, right_SV, logits_SV)[1:3] / (len(ids_S) - 1)
            for ids_S, right_SV, logits_SV in zip(ids_BS, right_BSV, logits_BSV, strict=True)
        ]
    loss_N, divergence_N = torch.stack(rows).unbind(1)
    return Cost(loss_N, divergence_N)
