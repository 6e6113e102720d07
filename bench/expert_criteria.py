"""What each criterion for dropping experts keeps, on a trained model: held-out perplexity beside experts drawn by lot.

    python -m bench.expert_criteria ../shared/models/mixtral-docs ../shared/data/docs [--seeds 3] [--json out.json]

Experts alone go, a quarter and a half of every MoE layer's; no weight is slimmed and no artifact written: the trimmed model is
read a block at a time and swept. Seeds choose the calibration text's samples, and of ``random`` the experts. Beside each mean
stands the spread over seeds, and how many of the seeds' draws by lot it beats.
"""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench._trained import arguments
from compression.architectures import find_architecture
from compression.block import Shell
from compression.calibration import TokenSet, load_calibration, load_evaluation
from compression.checkpoint.reader import Model
from compression.checkpoint.source import open_source
from compression.evaluation.perplexity import compare
from compression.methods import Choice, choose_cuts, merger
from compression.observer import Observer
from compression.planner.inventory import take_inventory
from compression.recipe import AnyStep, ExpertDrop, ExpertMerge
from compression.request import Calibration, Perplexity
from compression.study import Study
from compression.sweep import Push, Stream, sweep, working_dtype
from compression.trimming import Cuts, Routing
from compression.trimming.routers import Routers
from compression.trimming.view import TrimmedReader

SAMPLES, HELD_OUT, LENGTH = 128, 64, 256
CRITERIA = (
    "routing_score", "frequency", "expert_norm", "reap", "man", "msan", "hope", "reconstruction", "aimer", "random",
)  # fmt: skip
FIXED = ("aimer",)
"""Criteria that look at no text, and so have one value."""


def main() -> None:
    """Measure, and print a row as soon as it is known."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    bench = Bench(given.model, given.text)
    print(f"{SAMPLES} x {LENGTH} calibration tokens, {HELD_OUT} x {LENGTH} held-out tokens")
    print(f"original: {bench.original:.3f}")
    found: dict[str, Any] = {"original": bench.original}
    studies = [bench.study(seed) for seed in range(given.seeds)]
    for share in (0.25, 0.5):
        kept = round(bench.routing.experts * (1 - share))
        lots = [bench.after(ExpertDrop(criterion="random", experts_kept=kept, seed=seed), None) for seed in range(given.lots)]
        rows = {"random": lots}
        for criterion in CRITERIA[:-1]:
            step = ExpertDrop.model_validate({"criterion": criterion, "experts_kept": kept})
            rows[criterion] = [bench.after(step, study) for study in studies[: 1 if criterion in FIXED else None]]
        rows["ream (merged)"] = [bench.after(ExpertMerge(experts_kept=kept), study) for study in studies]
        found[f"{share:.0%} dropped"] = rows
        print(f"\n{share:.0%} of {bench.routing.experts} experts dropped")
        for name, values in sorted(rows.items(), key=lambda row: mean(row[1])):
            spread = f"+- {stdev(values):6.3f}" if len(values) > 1 else " " * 9
            beaten = sum(mean(values) < lot for lot in lots)
            beats = "" if name == "random" else f"beats {beaten} of {len(lots)} lots"
            print(f"{name:16s} {mean(values):9.3f} {spread} ({len(values)})  {beats}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lots", type=int, default=8, help="draws of the criterion random")
    parser.add_argument("--json", type=Path)


class Bench:
    """One model, its texts, and what is the same for every criterion."""

    def __init__(self, model: Path, text: Path) -> None:
        self.reader = open_source(model)
        self.architecture = find_architecture(self.reader.config)
        self._text = text
        held_out = Perplexity(source=(text / "heldout.txt").as_uri(), samples=HELD_OUT)
        self._held_out = load_evaluation(held_out, model, sequence_length=LENGTH)
        inventory = take_inventory(self.reader.checkpoint)
        self.routing = Routing(inventory.experts, inventory.top_k, inventory.groups, router=Routers(self.reader.config))
        mixtures = {block.index: tuple(range(inventory.experts)) for block in inventory.blocks if block.is_mixture}
        self.whole = Cuts(tuple(range(len(inventory.blocks))), mixtures)

    @cached_property
    def original(self) -> float:
        """The perplexity of the model as it is."""
        return self._perplexity(self.reader)

    def study(self, seed: int) -> Study:
        """Look at the model once, with everything that a criterion reads."""
        tokens = self.calibration(seed)
        observer = Observer(self.architecture, tokens.domains, tokens.domain_N, ("tokens", "sample"))
        shell = Shell(self.reader.config, self.reader.outside())
        stream = Stream(shell, tokens.ids_NS, dtype=working_dtype(shell.device, shell.dtype))
        sweep(shell, self.reader, stream, observer, lambda *_: None)
        return observer.study

    def calibration(self, seed: int) -> TokenSet:
        """Return one draw of the calibration text."""
        source = (self._text / "calibration.txt").as_uri()
        settings = Calibration(source=source, samples=SAMPLES, sequence_length=LENGTH, seed=seed)
        return load_calibration(settings, self.reader.folder)

    def after(self, step: AnyStep, study: Study | None) -> float:
        """Return the perplexity of the model after one step."""
        cuts = self.choose(step, study)
        merge = merger(self.architecture, cuts, study)
        return self._perplexity(TrimmedReader(self.reader, self.architecture, cuts, merge=merge))

    def choose(self, step: AnyStep, study: Study | None) -> Cuts:
        """Return what one step leaves."""
        return choose_cuts((step,), study, self.whole, Choice(frozenset(self.whole.blocks), self.routing))

    def _perplexity(self, model: Model) -> float:
        shell = Shell(model.config, model.outside())
        stream = Stream(shell, self._held_out.ids_NS, dtype=working_dtype(shell.device, shell.dtype))
        sweep(shell, model, stream, Push(), lambda *_: None)
        loss, tokens = 0.0, 0
        for ids_BS, logits_BSV in zip(stream.ids, stream.logits(shell), strict=True):
            for ids_S, logits_SV in zip(ids_BS, logits_BSV, strict=True):
                loss += float(compare(ids_S, logits_SV, logits_SV)[0])
                tokens += len(ids_S) - 1
        return float(torch.tensor(loss / tokens, dtype=torch.float64).exp())


if __name__ == "__main__":
    main()
