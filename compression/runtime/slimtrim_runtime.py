"""Opens a model that slimtrim stored with packed zeros: a stock transformers model, unpacked while it loads.

    from slimtrim_runtime import open_model
    model = open_model("folder/of/the/model")

Pruned weights are stored without their zeros, as ``config.json`` says under ``"slimtrim"``. In place of ``P.weight``
[O, I], of which n in every m consecutive inputs are kept, the files hold

* ``P.compressed`` [O, I n / m]: the kept values of each row, in order;
* ``P.bitmask`` [O, ceil(I / 8)], uint8: bit j % 8 of byte j // 8 is set where input j is kept;
* ``P.shape`` [2]: O and I.

This is the layout that compressed-tensors called sparse-24-bitmask up to its version 0.14, for any n:m. No stock loader
reads it any more, and the stock one is kept from trying, since it would fill the gaps with random weights.

The file stands alone: it needs torch, transformers and safetensors, and may be copied wherever the model goes.

Shapes: O outputs, I inputs, K kept inputs, M bytes of mask; any leading dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, GenerationConfig

SUFFIXES = (".compressed", ".bitmask", ".shape")


class CannotUnpack(ValueError):
    """A packed weight contradicts itself: the files are damaged."""


def open_model(folder: str | Path, **settings: Any) -> Any:
    """Return the model in ``folder`` as the stock class; ``settings`` are those of ``from_pretrained``."""
    folder = Path(folder)
    config = settings.pop("config", None) or AutoConfig.from_pretrained(folder)
    for key in ("slimtrim", "transformers_weights"):  # true of the files alone; the second keeps the stock loader away from them
        vars(config).pop(key, None)
    towers = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    stock: Any = (MODEL_FOR_MULTIMODAL_LM_MAPPING if towers else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    opened = stock.from_pretrained(None, config=config, state_dict=with_weights(_Files(folder)), **settings)
    model = opened[0] if isinstance(opened, tuple) else opened
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return opened


def with_weights(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved tensors with each packed one under its weight's name, unpacked when it is indexed with ``[...]``."""
    tensors: dict[str, Any] = {}
    for name in saved:
        stem = name.removesuffix(".compressed")
        if stem != name:
            tensors[f"{stem}.weight"] = _Packed(saved, stem)
        elif not name.endswith(SUFFIXES):
            tensors[name] = saved[name]
    return tensors


def unpack_sparse(compressed_OK: Tensor, bitmask_OM: Tensor, shape: Tensor) -> Tensor:
    """Return the weight [..., O, I]; CannotUnpack where the mask does not mark as many inputs as there are values."""
    outputs, inputs = (int(size) for size in shape)
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask_OM.device)
    mask_OI = (bitmask_OM.unsqueeze(-1) >> bits).bitwise_and_(1).flatten(-2)[..., :inputs].bool()
    if mask_OI.shape[-2:] != (outputs, inputs) or not (mask_OI.sum(-1) == compressed_OK.shape[-1]).all():
        raise CannotUnpack(f"the mask {list(bitmask_OM.shape)} of a packed weight {[outputs, inputs]} does not fit its values")
    weight_OI = compressed_OK.new_zeros(mask_OI.shape)
    return weight_OI.masked_scatter_(mask_OI, compressed_OK)


class _Packed:
    """A packed weight that is read and unpacked when the loader asks for it, one at a time."""

    def __init__(self, saved: Mapping[str, Any], stem: str) -> None:
        self._saved = saved
        self._stem = stem

    def __getitem__(self, index: Any) -> Tensor:
        compressed_OK, bitmask_OM, shape = (self._saved[f"{self._stem}{suffix}"][...] for suffix in SUFFIXES)
        try:
            return unpack_sparse(compressed_OK, bitmask_OM, shape)[index]
        except CannotUnpack as error:
            raise CannotUnpack(f"{self._stem}.weight cannot be unpacked: {error}") from error


class _Files(Mapping[str, Any]):
    """Every tensor of a folder's safetensors files by name; read when it is indexed with ``[...]``."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            files = {"model.safetensors"}
        opened = [safe_open(folder / file, framework="pt") for file in sorted(files)]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping

    def __getitem__(self, name: str) -> Any:
        return self._file_of[name].get_slice(name)

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)
