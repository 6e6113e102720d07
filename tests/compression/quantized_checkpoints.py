"""Quantized checkpoints of real weights, made by hand from dense ones by each format's own definition.

Each function reads a single-file checkpoint, writes a quantized copy beside its tokenizer and returns the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

Quantize = Callable[[str, Tensor], dict[str, Tensor]]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(dense: Path, out: Path, *, block: tuple[int, int] = (16, 16), scale: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write P.weight as float8 and one scale per block beside it."""

    def quantize(name: str, weight_OI: Tensor) -> dict[str, Tensor]:
        codes_OI, scale_ab = fp8_block(weight_OI, block)
        return {name: codes_OI, f"{name}_scale_inv": scale_ab.to(scale)}

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return _write(dense, out, quantize, {**settings, **config})


def fp8_block(weight_OI: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return float8 codes [O, I] and scales [ceil(O / a), ceil(I / b)]; the last block of a row may be cut off."""
    a, b = block
    rows, columns = weight_OI.shape
    tiles = pad(weight_OI.float(), (0, -columns % b, 0, -rows % a)).unflatten(0, (-1, a)).unflatten(2, (-1, b))
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    codes = (tiles / scale).to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    return codes, scale[:, 0, :, 0].contiguous()


def fp8_dynamic(dense: Path, out: Path, *, strategy: str = "channel", **config: Any) -> Path:
    """Write what compressed-tensors calls FP8_DYNAMIC: float8 weights, a scale per row (or matrix), dynamic activations."""

    def quantize(name: str, weight_OI: Tensor) -> dict[str, Tensor]:
        largest = weight_OI.abs().amax(1, keepdim=True) if strategy == "channel" else weight_OI.abs().amax().view(1)
        scale = (largest.float() / 448).to(weight_OI.dtype)
        return {name: (weight_OI.float() / scale.float()).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*gate$", "re:.*router$"], "kv_cache_scheme": None,
    }  # fmt: skip
    return _write(dense, out, quantize, {**settings, **config})


def mxfp4(dense: Path, out: Path, **config: Any) -> Path:
    """Write gpt_oss experts as four-bit floats: 16 bytes of two codes each and one power of two for every 32 inputs."""

    def quantize(name: str, weight_EIR: Tensor) -> dict[str, Tensor]:
        groups = weight_EIR.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponent = (groups.abs().amax(-1) / 6).log2().ceil()
        scaled = groups / exponent.exp2()[..., None]
        codes = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        return {
            f"{name}_blocks": (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8),
            f"{name}_scales": (exponent + 127).to(torch.uint8),
        }

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _write(dense, out, quantize, {"quant_method": "mxfp4", "modules_to_not_convert": skipped, **config})


def _write(dense: Path, out: Path, quantize: Quantize, quantization_config: dict[str, Any]) -> Path:
    shutil.copytree(dense, out)
    config = json.loads((dense / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        tensors |= quantize(name, tensor) if _is_quantized(name, tensor, config["model_type"]) else {name: tensor}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config}))
    return out


def _is_quantized(name: str, tensor: Tensor, model_type: str) -> bool:
    if model_type == "gpt_oss":
        return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    routes = name.endswith(("gate.weight", "router.weight"))
    return tensor.dim() == 2 and ".layers." in name and name.endswith(".weight") and not routes
