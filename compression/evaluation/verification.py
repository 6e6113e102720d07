"""Reopen the artifact with the stock loader and compare: it must be, bit for bit, the model that was computed.

An artifact that stock classes cannot open is opened with the loader that ships in it, once that file is found to be ours.

Where the dense model fits into memory it is opened as a whole. Where it does not, it is opened in windows: a folder
that holds the shards of a few blocks and a config cut to them, which ``from_pretrained`` opens as the small model it
is; hidden states are handed from window to window. Equality is demanded at equal batch shape, without a tolerance.

Shapes: B sequences, S tokens each, D width, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compression.architectures import Architecture
from compression.block import language_model, quiet, stock_class
from compression.checkpoint.reader import Reader
from compression.checkpoint.writer import RUNTIME, needs_runtime, write_json
from compression.errors import VerificationFailed
from compression.memory import give_back
from compression.report import Verification
from compression.runtime.slimtrim_runtime import CannotUnpack, open_model
from compression.sweep import OnBlock
from compression.trimming.surgery import cut_to_window

_BLOCKS_PER_WINDOW = 2


def verify(
    artifact: Path,
    architecture: Architecture,
    *,
    ids_BS: Tensor,
    logits_BSV: Tensor,
    whole: bool,
    on_block: OnBlock,
) -> Verification:
    """Prove that stock transformers, or the artifact's own loader, opens it and computes ``logits_BSV`` for ``ids_BS``.

    ``whole``: open it as a whole, for which the dense model must fit into memory. Raises VerificationFailed.
    """
    reader = Reader(artifact)
    scanned = _scan(reader, on_block)
    mode = "whole" if whole else "windows"
    opener = _opener(artifact)
    opened_BSV = (
        _whole(artifact, architecture, ids_BS, logits_BSV.device)
        if whole
        else in_windows(artifact, architecture, ids_BS=ids_BS, device=logits_BSV.device)
    )
    difference = float((opened_BSV.float() - logits_BSV.float()).abs().max())
    if not torch.equal(opened_BSV, logits_BSV):
        raise VerificationFailed(
            f"reopened {mode} with {opener}, the artifact's logits differ by up to {difference} from those "
            "computed while compressing; it is not published"
        )
    return Verification(
        opened_with=opener,
        mode=mode,
        largest_logit_difference=difference,
        tokens=ids_BS.numel(),
        tensors_scanned=scanned,
    )


def in_windows(
    artifact: Path, architecture: Architecture, *, ids_BS: Tensor, device: torch.device, blocks: int = _BLOCKS_PER_WINDOW
) -> Tensor:
    """Return the logits [B, S, V] of an artifact that is never in memory as a whole."""
    config = _config(artifact)
    count = architecture.block_count(config)
    # Blocks that are told apart by a period alone must keep their place in it.
    blocks = math.lcm(*(int(architecture.settings(config)[key]) for key in architecture.period_keys)) * blocks
    hidden_BSD: Tensor | None = None
    logits_BSV = torch.empty(0)
    for first in range(0, count, blocks):
        window = range(first, min(first + blocks, count))
        with tempfile.TemporaryDirectory(prefix="slimtrim-window-") as folder:
            model = _open(_window(artifact, architecture, window, Path(folder)), device, architecture, window)
            logits_BSV, hidden_BSD = _run(model, architecture, ids_BS.to(device), hidden_BSD)
            del model
        gc.collect()  # a loaded model refers to itself, so it would stay until the collector happens to run
        give_back()
    return logits_BSV


def _opener(artifact: Path) -> str:
    """Return what opens the artifact; refuse one that needs the loader and does not carry it."""
    stock = f"transformers {transformers.__version__}"
    if not needs_runtime(_config(artifact)):
        return stock
    shipped = artifact / RUNTIME.name
    if not shipped.exists() or shipped.read_bytes() != RUNTIME.read_bytes():
        raise VerificationFailed(f"the artifact does not hold the {RUNTIME.name} that alone opens it")
    return f"{RUNTIME.name} on {stock}"


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _scan(reader: Reader, on_block: OnBlock) -> int:
    blocks = reader.architecture.block_count(reader.checkpoint.config)
    scanned = 0
    for index in range(-1, blocks):
        for name, tensor in (reader.outside() if index < 0 else reader.block(index)).items():
            scanned += 1
            # Summed, since 8-bit floats know no isfinite: a sum is finite only if every term is.
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
                raise VerificationFailed(f"{name} holds a NaN or an infinity; the artifact is not published")
            if name.endswith("_scale") and not (tensor != 0).all():
                raise VerificationFailed(f"{name} holds a zero scale; the artifact is not published")
        on_block(index + 1, blocks, f"scanned {index + 1} of {blocks} blocks")
    return scanned


def _whole(artifact: Path, architecture: Architecture, ids_BS: Tensor, device: torch.device) -> Tensor:
    return _run(_open(artifact, device, architecture, range(0)), architecture, ids_BS.to(device), None)[0]


def _open(folder: Path, device: torch.device, architecture: Architecture, window: range) -> Any:
    renamed = {re.escape(architecture.prefix(block)): architecture.prefix(place) for place, block in enumerate(window)}
    config = _config(folder)
    from_pretrained: Any = open_model if needs_runtime(config) else stock_class(config).from_pretrained
    try:
        with quiet():
            model, info = from_pretrained(folder, key_mapping=renamed or None, output_loading_info=True, local_files_only=True)
    except CannotUnpack as error:
        raise VerificationFailed(f"{error}; the artifact is not published") from error
    # The tensors of a tied head are never in the files; everything else must be.
    if problems := [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"]), *sorted(info["mismatched_keys"])]:
        raise VerificationFailed(f"the loader misses or does not know {', '.join(map(str, problems[:3]))}")
    return model.to(device).eval()


@torch.no_grad()
def _run(opened: Any, architecture: Architecture, ids_BS: Tensor, hidden_BSD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits and what leaves the last block; ``hidden_BSD``: what enters the first, the embedding if not given."""
    left: list[Tensor] = []
    model = language_model(architecture, opened)
    blocks = model.get_decoder().layers

    def take(module: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    # Put in at the block itself: some families scale whatever is given as an embedding.
    hooks = [blocks[-1].register_forward_hook(take)]
    if hidden_BSD is not None:
        hooks.append(blocks[0].register_forward_pre_hook(lambda _, args: (hidden_BSD, *args[1:])))
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits_BSV, left[0]


def _window(artifact: Path, architecture: Architecture, window: range, folder: Path) -> Path:
    write_json(folder / "config.json", cut_to_window(_config(artifact), architecture, window))
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    inside = {None, *window}
    weight_map = {name: file for name, file in index["weight_map"].items() if architecture.block_of(name) in inside}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for file in set(weight_map.values()):
        (folder / file).symlink_to((artifact / file).resolve())
    return folder
