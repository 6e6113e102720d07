"""Artifacts trimmed by hand, without any criterion: the cuts are the test's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.architectures import Architecture, find_architecture
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantized_entries
from compression.checkpoint.writer import Writer, sparse_config
from compression.compress import Compressor
from compression.recipe import Pattern, Prune, Quantize
from compression.slim import Slimming
from compression.sweep import Push, Stream, sweep
from compression.trimming import Cuts
from compression.trimming.view import TrimmedReader

IDS_NS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(7))


def whole_cuts(source: Path) -> Cuts:
    """Return the cuts that leave everything."""
    reader = Reader(source)
    architecture, count = find_architecture(reader.config), find_architecture(reader.config).block_count(reader.config)
    routers = {block: reader.checkpoint.tensors.get(architecture.router_name(block)) for block in range(count)}
    return Cuts(tuple(range(count)), {b: tuple(range(router.shape[0])) for b, router in routers.items() if router is not None})


def trimmed(
    source: Path,
    out: Path,
    cuts: Cuts,
    *,
    zero_width: int | None = None,
    prune: Prune | None = None,
    packed: Pattern | None = None,
    quantize: Quantize | None = None,
) -> Tensor:
    """Write the artifact, and return the logits that the compressing process computed."""
    reader = Reader(source)
    architecture: Architecture = find_architecture(reader.config)
    view = TrimmedReader(reader, architecture, cuts, zero_width=zero_width)
    config = dict(view.config)
    if quantize is not None:
        config |= quantized_entries(architecture, quantize, view.config, cuts.blocks)
    if packed is not None:
        config |= sparse_config(packed, config)
    writer, outside = Writer(out, config), view.outside()
    writer.outside(outside)
    plain = Shell(view.config, outside)
    shell = Shell(config, outside) if config != view.config else plain
    witness = Stream(shell, IDS_NS)
    slimming = Slimming(prune, quantize, packed)
    calibration = None if slimming.needs == "nothing" else Stream(shell, IDS_NS)
    Compressor(architecture, slimming, plain, shell, writer, calibration, witness).run(view, lambda *_: None)
    writer.finish(source)
    return next(witness.logits(shell))


def swept(reader: Reader | TrimmedReader) -> Tensor:
    """Return the logits of a checkpoint that is read a block at a time."""
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, IDS_NS)
    sweep(shell, reader, stream, Push(), lambda *_: None)
    return next(stream.logits(shell))


def said_far_from_here(artifact: Path, folder: Path, opening: str, saying: str) -> str:
    """Copy an artifact away, open it in a fresh process that must not load anything of ours, and return what that says.

    ``opening`` makes ``model``; ``saying`` is what is printed of it.
    """
    shutil.copytree(artifact, folder / "moved")
    script = (
        f"import sys; {opening};"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('compression', 'api', 'jobs', 'worker')];"
        f"print({saying})"
    )
    environment = {"HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder / "moved", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits for the ids that ``trimmed`` computed its own for."""
    return model(input_ids=IDS_NS, use_cache=False).logits
