"""One block made live on the device from the stock transformers class, and let go.

The stock model is built on ``meta``, where it costs nothing. What lies outside the blocks (embeddings, final
norm, head) is loaded once; a block is loaded through transformers' own conversion and quantizer hooks when it
is visited and sent back to ``meta`` afterwards. What the stock model would pass to each block is recorded by
running the stock forward once with every block's ``forward`` replaced, never rebuilt by hand; the same trick
turns the last activations into logits.

Every half-private transformers function this library needs is used in this file and nowhere else.

Shapes: B sequences, S tokens each, D width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer
from transformers.utils import logging as transformers_logging

from compression.architectures import Architecture, find_architecture
from compression.errors import BrokenCheckpoint
from compression.runtime.slimtrim_runtime import CannotUnpack, shape_, stock_settings, with_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Call:
    """The arguments, besides the hidden states, with which the stock model calls one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """What the stock model does with one batch before and around its blocks."""

    hidden_BSD: Tensor
    calls: tuple[Call, ...]


class Shell:
    """A stock causal language model whose blocks are empty until they are visited."""

    def __init__(self, config: Mapping[str, Any], outside: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Build the model of a config.json; ``outside`` holds the saved tensors that belong to no block."""
        self._build(config, device)
        self._load(outside)
        self.model.tie_weights()
        in_blocks = set(self.blocks.modules())
        _revive_buffers(self.model, [m for m in self.model.modules() if m not in in_blocks], self.device)
        self._refuse_holes((n, t) for n, t in _tensors(self.model) if not n.startswith(f"{self._path}."))

    def _build(self, config: Mapping[str, Any], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.dtype = dtype_of(config)
        self._config, self._section = stock_config(config), config.get("slimtrim", {})
        row = find_architecture(config)
        self._quantizer = None
        if getattr(self._config, "quantization_config", None) is not None:
            self._quantizer = self._make_quantizer()
            _share(self._quantizer)
        with torch.device("meta"), quiet():
            self.model: PreTrainedModel = stock_class(config)._from_config(self._config, dtype=self.dtype).eval()
            shape_(self.model, self._section)
            if self._quantizer is not None:
                self._quantizer.preprocess_model(
                    model=self.model, dtype=self.dtype, device_map=None, checkpoint_files=None, use_kernels=False
                )
                self.model.config._is_quantized = True  # which from_pretrained notes too, and some families compute by
                # The stock hook unpacks the whole model at its first forward; here every block is unpacked alone.
                if hasattr(self._quantizer, "compressor"):
                    self._quantizer.compressor.remove_decompression_hook(self.model)
        self.language_model = language_model(row, self.model)
        self._has_towers = bool(row.text_config)
        self.blocks = cast(nn.ModuleList, self.language_model.get_decoder().layers)
        self._path = next(name for name, module in self.model.named_modules() if module is self.blocks)

    def _make_quantizer(self) -> Any:
        user_agent = {"framework": "pytorch", "from_auto": False}
        quantizer, self._config, _ = get_hf_quantizer(self._config, None, {"": self.device}, True, user_agent)
        return quantizer

    @contextmanager
    def live(self, index: int, saved: Mapping[str, Tensor]) -> Generator[nn.Module]:
        """Yield block ``index`` on the device, holding the saved tensors; empty it afterwards."""
        empty = self.blocks[index]
        block = self.blocks[index] = deepcopy(empty)  # nothing but shapes so far; unpacking will change its layout
        try:
            self._load(saved)
            _revive_buffers(self.model, list(block.modules()), self.device)
            self._refuse_holes((f"{self._path}.{index}.{n}", t) for n, t in _tensors(block))
            _unpack(block)
            yield block
        finally:
            self.blocks[index] = empty

    @torch.no_grad()
    def record(self, ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> Recording:
        """Return the first block's input and every block's call for a batch of token ids."""
        calls: list[Call | None] = [None] * len(self.blocks)
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                first.append(hidden_BSD)
                calls[index] = Call(args, kwargs)
                return hidden_BSD

            return forward

        inputs = {"input_ids": ids_BS.to(self.device), "attention_mask": _to(attention_mask_BS, self.device)}
        with self._replaced_forwards(recorder):
            if self._has_towers:  # only the whole knows where text stands among pictures and sound
                with _silenced(self.language_model.get_output_embeddings()):
                    self.language_model(**inputs, use_cache=False)
            else:
                self.model.get_decoder()(**inputs, use_cache=False)
        return Recording(first[0], tuple(cast(list[Call], calls)))

    def convert_(self, dtype: torch.dtype) -> None:
        """Compute logits in another dtype from here on; no block can be visited afterwards."""
        cast(nn.Module, self.model).to(dtype)

    @torch.no_grad()
    def logits(self, ids_BS: Tensor, hidden_BSD: Tensor) -> Tensor:
        """Return the stock model's logits [B, S, V] for the last block's output."""
        last = len(self.blocks) - 1

        def stub(index: int) -> Callable[..., Tensor]:
            return lambda hidden, *args, **kwargs: hidden_BSD.to(self.device) if index == last else hidden

        with self._replaced_forwards(stub):
            return self.language_model(input_ids=ids_BS.to(self.device), use_cache=False).logits

    @contextmanager
    def _replaced_forwards(self, make: Callable[[int], Callable[..., Tensor]]) -> Generator[None]:
        try:
            for index, block in enumerate(self.blocks):
                block.forward = make(index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _load(self, saved: Mapping[str, Tensor]) -> None:
        # The transforms keep state while they run, so every load gets its own copy.
        mapping: Any = deepcopy(get_model_conversion_mapping(self.model, None, self._quantizer))
        for operation in (part for transform in mapping for part in getattr(transform, "operations", ())):
            _share(operation)
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=mapping,
            hf_quantizer=self._quantizer,
            device_map={"": self.device},
        )
        try:
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self.model, with_weights(saved, self._section), config)
        except CannotUnpack as error:
            raise BrokenCheckpoint(str(error)) from error
        if info.conversion_errors or info.mismatched_keys or info.unexpected_keys:
            problems = [*info.conversion_errors.items(), *info.mismatched_keys, *sorted(info.unexpected_keys)]
            raise BrokenCheckpoint(f"the stock loader does not accept these tensors: {problems[:3]}")

    def _refuse_holes(self, tensors: Any) -> None:
        holes = [name for name, tensor in tensors if tensor.is_meta]
        if holes:
            raise BrokenCheckpoint(f"the checkpoint has no tensor for {', '.join(sorted(holes)[:3])}")


class Blocks(Shell):
    """The blocks of a model and nothing around them: enough to make one live, not to embed tokens or read logits."""

    def __init__(self, config: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Build the blocks of a config.json."""
        self._build(config, device)


class Unpacker(Shell):
    """Makes the quantized tensors of one block dense, through the stock quantizer hooks, under the stock's saved names."""

    def __init__(self, config: Mapping[str, Any], loading: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """``config`` is the dense model's, ``loading`` the quantization_config that the stock hooks are given."""
        self._build({**config, "quantization_config": dict(loading)}, device)
        self._block_size = loading.get("weight_block_size")

    def _make_quantizer(self) -> Any:
        stored: dict[str, Any] = cast(Any, self._config).quantization_config
        if stored["quant_method"] != "fp8":
            return super()._make_quantizer()
        # Without its look at the environment: that asks for accelerate, which kernels need and unpacking does not.
        return AutoHfQuantizer.from_config(stored, pre_quantized=True)

    @torch.no_grad()
    def dense(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what these quantized tensors unpack to; whatever a matrix consists of must be among them."""
        empty, self.model = self.model, deepcopy(self.model)
        try:
            self._load(self._even(packed))
            for module in self.model.modules():
                # Biases are never quantized, so they are not among what was loaded.
                if is_module_quantized(module) and not any(t.is_meta for n, t in module.named_parameters() if n != "bias"):
                    decompress_module(module)
            vars(self.model).pop("_weight_conversions", None)  # reversed, those of the load would quantize again
            loaded = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
            return revert_weight_conversion(self.model, loaded)
        finally:
            self.model = empty

    def _even(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The stock hook takes a matrix's height over the scales' as the height of a block, which is wrong, or refused,
        # where the last block is cut off. Repeated scales say the same on a grid that divides the matrix evenly.
        if self._block_size is None:
            return dict(packed)
        even = dict(packed)
        for name, scale in packed.items():
            if name.endswith("_scale_inv"):
                for dim, size in enumerate(self._block_size):
                    length = packed[name.removesuffix("_scale_inv")].shape[dim]
                    place = torch.arange(0, length, math.gcd(length, size)) // size
                    scale = scale.index_select(dim, place)
                even[name] = scale
        return even


def empty_model(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Return the stock model of a config.json on ``meta``."""
    with torch.device("meta"), quiet():
        return stock_class(config)._from_config(stock_config(config), dtype=dtype).eval()


def stock_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Return the stock config object for the contents of a config.json."""
    decoded = PretrainedConfig._decode_special_floats(
        deepcopy(stock_settings(config))
    )  # JSON has no infinity; stock writes a tag
    return CONFIG_MAPPING[config["model_type"]].from_dict(decoded)


def stock_class(config: Mapping[str, Any]) -> Any:
    """Return the stock class that opens a model with this config.json: with all its towers, where it has several."""
    auto: Any = AutoModelForMultimodalLM if find_architecture(config).text_config else AutoModelForCausalLM
    return auto._model_mapping[type(stock_config(config))]


def language_model(architecture: Architecture, model: Any) -> Any:
    """Return the part of a stock model that makes logits of tokens."""
    return model.get_submodule(architecture.running_language_model)


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which the stock loader runs a model whose config.json names one."""
    return _DTYPES[config.get("dtype") or config["torch_dtype"]]


def _share(settings: object) -> None:
    # The loader copies its conversions once for every tensor, to the bottom; what holds settings and no state can be shared.
    settings.__dict__["__deepcopy__"] = lambda _: settings


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _revive_buffers(model: PreTrainedModel, modules: list[nn.Module], device: torch.device) -> None:
    # Buffers that are not saved (rotary tables) were built on meta too: the stock initialiser fills them.
    for module in modules:
        unsaved = ((name, module._buffers[name]) for name in module._non_persistent_buffers_set)
        missing = {name: buffer for name, buffer in unsaved if buffer is not None and buffer.is_meta}
        for name, buffer in missing.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if missing:
            model._init_weights(module)


def _unpack(block: nn.Module) -> None:
    for module in block.modules():
        if is_module_quantized(module):
            decompress_module(module)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@contextmanager
def _silenced(head: nn.Module) -> Generator[None]:
    # Nobody wants the logits, and they would be most of the work.
    head.forward = lambda hidden_BSD: hidden_BSD[:, :1]
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)


@contextmanager
def quiet() -> Generator[None]:
    """Silence the stock loader: it draws a bar and lists every other block as missing, once per block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
