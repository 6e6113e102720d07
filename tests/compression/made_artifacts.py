"""Artifacts slimmed by the plainest means, to try planner, writer and loaders without any method.

``pruned(folder, out, "2:4")`` keeps the largest weights and packs the zeros; ``rounded(folder, out, step)`` rounds to
nearest. Each returns nothing but the folder, and leaves beside it in ``dense`` the same model with every weight whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.architectures import Architecture, find_architecture
from compression.checkpoint.packing import pack
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantization_config
from compression.checkpoint.sparse import packed_tensors
from compression.checkpoint.writer import Writer, sparse_config
from compression.recipe import BITS, Quantize, parse_pattern

Stored = tuple[dict[str, Tensor], Tensor]
"""What is saved in place of a weight, and the weight that it stands for."""


def pruned(source: Path, out: Path, pattern: str, *, shared_experts: bool = False) -> Path:
    """Write the model with n of every m inputs of its experts kept, packed; return the folder with the whole weights."""
    n, m = parse_pattern(pattern)
    components = {"experts", *(["shared_experts"] if shared_experts else [])}

    def store(name: str, weight_OI: Tensor, architecture: Architecture) -> Stored | None:
        if architecture.component_of(name) not in components:
            return None
        groups_OGm = weight_OI.unflatten(1, (-1, m))
        gone_OGm = groups_OGm.abs().float().argsort(-1).argsort(-1) < m - n
        dense_OI = groups_OGm.masked_fill(gone_OGm, 0).flatten(1)
        return packed_tensors(name.removesuffix(".weight"), dense_OI, parse_pattern(pattern)), dense_OI

    return _write(source, out, sparse_config(parse_pattern(pattern)), store)


def rounded(source: Path, out: Path, step: Quantize) -> Path:
    """Write the model with its weights rounded to nearest as the step says; return the folder with the whole weights."""
    schemes = {
        "experts": step.scheme,
        "attention": step.attention,
        "shared_experts": step.shared_experts,
        "dense": step.dense,
    }

    def store(name: str, weight_OI: Tensor, architecture: Architecture) -> Stored | None:
        scheme = schemes.get(architecture.component_of(name), "keep")
        if scheme == "keep":
            return None
        return _floats(name, weight_OI) if scheme == "FP8_DYNAMIC" else _integers(name, weight_OI, BITS[scheme], step.group_size)

    architecture = find_architecture(Reader(source).config)
    return _write(source, out, {"quantization_config": quantization_config(architecture, step)}, store)


def _floats(name: str, weight_OI: Tensor) -> Stored:
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 448
    codes_OI = (weight_OI.float() / scale_O1.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes_OI, f"{name}_scale": scale_O1}, (codes_OI.float() * scale_O1.float()).to(weight_OI.dtype)


def _integers(name: str, weight_OI: Tensor, bits: int, group_size: int | None) -> Stored:
    inputs = weight_OI.shape[1]
    groups_OGg = weight_OI.unflatten(1, (-1, inputs if group_size in (None, -1) else group_size))
    scale_OG1 = groups_OGg.abs().amax(2, keepdim=True) / ((2**bits - 1) / 2)
    codes_OGg = (groups_OGg / scale_OG1).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    saved = {
        f"{name}_packed": pack(codes_OGg.flatten(1).to(torch.int8), bits),
        f"{name}_scale": scale_OG1.squeeze(2),
        f"{name}_shape": torch.tensor(weight_OI.shape, dtype=torch.int64),
    }
    return saved, (codes_OGg * scale_OG1).flatten(1)


def _write(source: Path, out: Path, extra: dict[str, Any], store: Callable[[str, Tensor, Architecture], Stored | None]) -> Path:
    reader = Reader(source)
    architecture = find_architecture(reader.config)
    small, whole = Writer(out, {**reader.config, **extra}), Writer(out.parent / f"{out.name}-dense", reader.config)
    for writer in (small, whole):
        writer.outside(reader.outside())
    for index in range(reader.config["num_hidden_layers"]):
        saved = reader.block(index)
        dense = dict(saved)
        for name, tensor in list(saved.items()):
            matrix = name.endswith(".weight") and tensor.dim() == 2 and not name.endswith("_gate.weight")
            stored = store(name, tensor, architecture) if matrix else None
            if stored is not None:
                del saved[name]
                saved |= stored[0]
                dense[name] = stored[1]
        small.block(index, saved)
        whole.block(index, dense)
    for writer in (small, whole):
        writer.finish(source)
    return whole.folder


def tampered(artifact: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Return a copy of an artifact in whose second block's shard something was changed."""
    copy = shutil.copytree(artifact, tmp_path / "copy")
    shard = copy / "model-00003-of-00005.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    return copy
