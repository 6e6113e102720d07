"""Opens a model that slimtrim stored in its custom profile, as the stock transformers model that it is but for its shape.

    from slimtrim_runtime import open_model
    model = open_model("folder/of/the/model")

or, since ``config.json`` names this file in its ``auto_map``,

    model = AutoModelForCausalLM.from_pretrained("folder/of/the/model", trust_remote_code=True)

What the model is made of beyond its family stands in ``config.json`` under ``"slimtrim"``:

* ``"experts"``, per block: how many experts it has; ``null`` where it is dense; 0 where it lost its router with its
  last expert, and keeps its norm and its shared experts; -1 where the whole MoE layer is gone, with its norm.
* ``"skip"``, per block: the beta with which it skips experts at run time (``skip_experts``), or ``null``.
* ``"sparse"``: pruned weights are stored without their zeros. In place of ``P.weight`` [O, I], of which n in every m
  consecutive inputs are kept, the files hold

  * ``P.compressed`` [O, I n / m]: the kept values of each row, in order;
  * ``P.bitmask`` [O, ceil(I / 8)], uint8: bit j % 8 of byte j // 8 is set where input j is kept;
  * ``P.shape`` [2]: O and I.

  This is the layout that compressed-tensors called sparse-24-bitmask up to its version 0.14, for any n:m.

* ``"packed_experts"``: routed experts are integers of a width that differs from block to block: ``"bits"``, per block, or
  ``null`` where they are stored like any other weight. ``"names"`` is what names of experts begin with, with the block in
  parentheses. In place of ``P.weight`` [O, I] the files hold compressed-tensors' pack-quantized layout, which stock
  transformers reads for one width alone:

  * ``P.weight_packed`` [O, W], int32: each row's integers plus 2^(bits - 1), the first in the lowest bits, end to end;
  * ``P.weight_scale`` [O, G]: what the integers of each of G equal runs of inputs are multiplied by;
  * ``P.weight_shape`` [2]: O and I.

No stock loader reads any of these, and the stock one is kept from trying: it would fill the gaps with random weights.

The file stands alone: it needs torch, transformers and safetensors, and may be copied wherever the model goes.

Shapes: O outputs, I inputs, K kept inputs, M bytes of mask, W words, B bytes, J times eight integers, G groups, any leading
dimensions; T tokens, C chosen experts, D width.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, GenerationConfig

SUFFIXES = (".compressed", ".bitmask", ".shape")
INTEGERS = (".weight_packed", ".weight_scale", ".weight_shape")
_PACKINGS = ("sparse", "packed_experts")
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMultimodalLM")
_OURS = ("slimtrim", "auto_map", "transformers_weights")


class CannotUnpack(ValueError):
    """A packed weight contradicts itself: the files are damaged."""


def declared(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of config.json that say how a model is to be opened, and keep the stock loader from trying.

    Stock transformers would warn of missing weights and make them up. A name of weights that is no safetensors file makes
    it stop instead, with that name in its message.
    """
    way_out = f"trust_remote_code=True, or open_model of {Path(__file__).name}, which lies beside it"
    return {
        "slimtrim": dict(section),
        "auto_map": dict.fromkeys(_AUTO_CLASSES, f"slimtrim_runtime.{SlimtrimForCausalLM.__name__}"),
        "transformers_weights": f"none that the stock loader reads: open this model with {way_out}",
    }


def stock_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json without what is not meant for stock classes."""
    return {key: value for key, value in config.items() if key not in _OURS}


def open_model(folder: str | Path, **settings: Any) -> Any:
    """Return the model in ``folder`` as the stock class; ``settings`` are those of ``from_pretrained``."""
    folder = _downloaded(folder, settings)
    given = settings.pop("config", None)
    config, section = _taken_apart(AutoConfig.from_pretrained(folder) if given is None else given)
    stock = _stock_class(config)
    tensors = with_weights(_Files(folder), section, settings.get("key_mapping"))
    opened = _shaped(stock, section).from_pretrained(None, config=config, state_dict=tensors, **settings)
    model = opened[0] if isinstance(opened, tuple) else opened
    model.__class__ = stock
    if "experts" in section:
        model.save_pretrained = partial(_save, model, {key: section[key] for key in section if key not in _PACKINGS})
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return opened


class SlimtrimForCausalLM:
    """What stock auto classes find in this file: it opens models, and is the class of none."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Any:
        """Return the model as ``open_model`` does."""
        return open_model(folder, **settings)

    @classmethod
    def _from_config(cls, config: Any, **settings: Any) -> Any:
        config, section = _taken_apart(config)
        stock = _stock_class(config)
        model = _shaped(stock, section)._from_config(config, **settings)
        model.__class__ = stock
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Do nothing: a model that is saved again is one of the stock class."""


def shape_(model: Any, section: Mapping[str, Any]) -> None:
    """Bring a stock model, built on ``meta`` or new, into the shape that config.json describes under ``"slimtrim"``."""
    if "experts" not in section:
        return
    language_model = model.get_submodule(section["language_model"])
    blocks, config = language_model.get_decoder().layers, language_model.config.get_text_config(decoder=True)
    for index, (count, beta) in enumerate(zip(section["experts"], section["skip"], strict=True)):
        if count is None:
            continue
        if count == -1:
            _replace_(blocks[index], section["layer"], _Nothing(section["layer_returns"]))
            _replace_(blocks[index], section["norm"], nn.Identity())
            for shared in section["beside"]:
                _replace_(blocks[index], shared, _Nothing(1))
        elif count == 0:
            _replace_(blocks[index], section["experts_module"], _Nothing(1))
            _replace_(blocks[index], section["router"], _NoRouter())
            _disown_(blocks[index].get_submodule(section["layer"]))
        else:
            blocks[index] = with_experts(count, model, blocks[index], index, config, section)
        if beta is not None:
            experts = blocks[index].get_submodule(section["experts_module"])
            experts._is_expert_parallel = True  # then the stock implementations know of ids that stand for nobody
            experts.register_forward_pre_hook(partial(skip_experts, beta))


def skip_experts(beta: float, experts: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave out, token by token, the experts that weigh little beside the others; what is called before ``experts``.

    With a token's weights in descending order, the fewest i of them stay whose sum, times ``beta``, is above the sum of the
    rest; they are scaled up to what all weighed. Of two experts the second is left out if it weighs less than beta times
    the first, as in Lu et al., "Not All Experts are Equal", arXiv:2402.14800.
    """
    x_TD, ids_TC, weights_TC, *more = args
    sorted_TC, order_TC = weights_TC.float().sort(dim=-1, descending=True, stable=True)
    rest_TC = sorted_TC.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    kept_T1 = 1 + (rest_TC >= beta * sorted_TC.cumsum(-1)[:, :-1]).sum(-1, keepdim=True)
    gone_TC = order_TC.argsort(-1) >= kept_T1
    stay_TC = weights_TC.float().masked_fill(gone_TC, 0.0)
    scaled_TC = stay_TC * (sorted_TC.sum(-1, keepdim=True) / stay_TC.sum(-1, keepdim=True))
    weights_TC = torch.where(gone_TC.any(-1, keepdim=True), scaled_TC.to(weights_TC.dtype), weights_TC)
    nobody: Any = experts.num_experts
    if experts.config._experts_implementation == "eager":
        # Not every family's own loop knows of nobody: its best expert, which runs anyway, takes the place with weight 0.
        nobody = ids_TC.gather(-1, order_TC[:, :1])
    return x_TD, torch.where(gone_TC, nobody, ids_TC), weights_TC, *more


def with_weights(
    saved: Mapping[str, Any], section: Mapping[str, Any], key_mapping: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the saved tensors with each packed one under its weight's name, unpacked when it is indexed with ``[...]``.

    ``section``: config.json's, which says of routed experts whether they are packed; other integers are the stock loader's.
    ``key_mapping``: as the stock loader is given it; blocks count as they are called by it.
    """
    tensors: dict[str, Any] = {}
    for name in saved:
        stem, dot, kind = name.rpartition(".")
        bits = _bits_of(name, section, key_mapping or {}) if dot + kind in INTEGERS else None
        if dot + kind == SUFFIXES[0]:
            tensors[f"{stem}.weight"] = _Packed(saved, stem, SUFFIXES, unpack_sparse)
        elif bits is not None and dot + kind == INTEGERS[0]:
            tensors[f"{stem}.weight"] = _Packed(saved, stem, INTEGERS, partial(unpack_integers, bits))
        elif bits is None and dot + kind not in SUFFIXES:
            tensors[name] = saved[name]
    return tensors


def _bits_of(name: str, section: Mapping[str, Any], key_mapping: Mapping[str, str]) -> int | None:
    """Return how many bits the integers of an expert have; None for what is no business of this file."""
    if "packed_experts" not in section:
        return None
    for pattern, new in key_mapping.items():
        name, found = re.subn(pattern, new, name, count=1)
        if found:
            break
    match = re.match(section["packed_experts"]["names"], name)
    return section["packed_experts"]["bits"][int(match[1])] if match else None


def unpack_integers(bits: int, packed_OW: Tensor, scale_OG: Tensor, shape: Tensor) -> Tensor:
    """Return the weight [..., O, I], in the dtype of the scales; CannotUnpack where the words do not hold as many integers.

    Eight integers are exactly as many bytes as one has bits, and one 64-bit number: they are taken from it one by one.
    """
    outputs, inputs = (int(size) for size in shape)
    groups, words = scale_OG.shape[-1], -(-inputs * bits // 32)
    if packed_OW.shape[-2:] != (outputs, words) or scale_OG.shape[-2] != outputs or inputs % groups:
        raise CannotUnpack(f"{list(packed_OW.shape)} words and {list(scale_OG.shape)} scales do not fit {[outputs, inputs]}")
    bytes_OB = packed_OW.contiguous().view(torch.uint8)
    bytes_OJB = pad(bytes_OB, (0, -bytes_OB.shape[-1] % bits)).unflatten(-1, (-1, bits))
    eight_OJ = pad(bytes_OJB, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    lowest, most = 2 ** (bits - 1), 2**bits - 1
    codes = [((eight_OJ >> bits * place) & most).sub_(lowest).to(torch.int8) for place in range(8)]
    codes_OI = torch.stack(codes, dim=-1).flatten(-2)[..., :inputs]
    weight_OGN = codes_OI.unflatten(-1, (groups, -1)).to(scale_OG.dtype)
    return weight_OGN.mul_(scale_OG.unsqueeze(-1)).flatten(-2)


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

    def __init__(self, saved: Mapping[str, Any], stem: str, suffixes: tuple[str, ...], unpack: Callable[..., Tensor]) -> None:
        self._saved, self._stem, self._suffixes, self._unpack = saved, stem, suffixes, unpack

    def is_floating_point(self) -> bool:
        """Say, where the loader asks before it reads, that this is a weight like any other."""
        return True

    def __getitem__(self, index: Any) -> Tensor:
        try:
            parts = [self._saved[f"{self._stem}{suffix}"][...] for suffix in self._suffixes]
            return self._unpack(*parts)[index]
        except (CannotUnpack, KeyError) as error:
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


class _Nothing(nn.Module):
    """Stands where a layer or a set of experts was, and answers zeros."""

    def __init__(self, returns: int) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, x: Tensor, *_: Any) -> Any:
        zeros = torch.zeros_like(x)
        return zeros if self.returns == 1 else (zeros, *[None] * (self.returns - 1))


class _NoRouter(nn.Module):
    """Stands where a router was, and chooses none of no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)  # no parameter: for stock initialisers, which reach for it

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        none_T0 = x.new_zeros(x.shape[:-1].numel(), 0)
        return none_T0, none_T0, none_T0.long()


def _replace_(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _disown_(layer: Any) -> None:
    """Take away the tensors that a layer holds on its router's behalf: corrections of what it thinks of each expert."""
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        delattr(layer, name)
        layer.register_buffer(name, tensor.detach().new_zeros(0), persistent=False)
    layer._is_hf_initialized = True  # stock initialisers would reach for experts that are not there


def with_experts(count: int, model: Any, block: Any, index: int, config: Any, section: Mapping[str, Any]) -> Any:
    """Return the block as its class builds it for so many experts; the block itself where it has as many."""
    keys, given = section["count_keys"], getattr(config, section["top_k_key"])
    top_k = given[index] if isinstance(given, list) else given
    if count >= top_k and all(getattr(config, key, None) == count for key in keys):
        return block
    own = deepcopy(config)
    for key in keys:
        setattr(own, key, count)
    used = min(top_k, count)
    setattr(own, section["top_k_key"], [used] * len(given) if isinstance(given, list) else used)
    like, default = next(block.parameters()), torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with torch.device(like.device):
            new = type(block)(own, index)
    finally:
        torch.set_default_dtype(default)
    for module in new.modules():
        if getattr(module, "config", None) is own:
            module.config = config  # the model's own, so that what is set there later is true of every block
    if not like.is_meta:
        new.apply(model._init_weights)
    return new.train(block.training)


def _stock_class(config: Any) -> Any:
    """Return the stock class of a model: with all its towers, where it has several."""
    towers = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and config.get_text_config(decoder=True) is not config
    return (MODEL_FOR_MULTIMODAL_LM_MAPPING if towers else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]


def _taken_apart(config: Any) -> tuple[Any, dict[str, Any]]:
    """Return the config as the stock class may see it, and our section of it."""
    config = deepcopy(config)
    section: dict[str, Any] = getattr(config, "slimtrim", {})
    for key in _OURS:
        vars(config).pop(key, None)
    return config, section


def _shaped(stock: Any, section: Mapping[str, Any]) -> Any:
    """Return a stock model's class that shapes what it builds; it goes by the stock class's name."""

    def build(self: Any, *args: Any, **settings: Any) -> None:
        stock.__init__(self, *args, **settings)
        shape_(self, section)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})


def _save(model: Any, section: Mapping[str, Any], folder: str | Path, *args: Any, **settings: Any) -> None:
    """Save a model that the stock loader cannot open so that this file opens it again."""
    type(model).save_pretrained(model, folder, *args, **settings)
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **declared(section)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(__file__, path.with_name("slimtrim_runtime.py"))


def _downloaded(folder: str | Path, settings: dict[str, Any]) -> Path:
    """Return the folder itself, or where the hub's repository of that name lies once it has been fetched."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    hub = {name: settings.pop(name) for name in names if name in settings}
    if Path(folder).is_dir():
        return Path(folder)
    return Path(snapshot_download(str(folder), **hub))
