"""The dense checkpoint that a quantized one stands for, told from config.json and the tensor headers alone.

What is planned, counted and written is always the dense checkpoint: the names that the stock class saves, the
weights in the model's dtype. Three ways of storing a weight are known here, those that the stock quantizer hooks
unpack exactly; any other is refused by name.

    fp8                  P.weight F8_E4M3 [O, I], P.weight_scale_inv, one scale per block of weight_block_size
    compressed-tensors   P.weight_packed I32, P.weight_scale, P.weight_shape, symmetric integers ("pack-quantized");
                         P.weight F8_E4M3, P.weight_scale, one scale per row or matrix ("float-quantized")
    mxfp4                X_blocks U8 [E, R, G, 16], X_scales U8 [E, R, G] -> X [E, 32 G, R], gpt_oss only

Which tensors are packed, and how, is taken from the headers and only from them: config.json lists the schemes, and
the one that fits a tensor's shapes is its scheme. Its patterns are never run, since whoever wrote them is not trusted.

Shapes: O outputs, I inputs, E experts, R rows, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, NoReturn, cast

from compression.architectures import Architecture
from compression.checkpoint.headers import DTYPE_BITS, TensorHeader
from compression.errors import BrokenCheckpoint, QuantizedSource

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
METHODS = (
    "fp8 (in blocks, dynamic activations), mxfp4 (gpt_oss), compressed-tensors "
    "(pack-quantized symmetric integers of 4 or 8 bits, float-quantized by row or matrix)"
)
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCALE_DTYPES = ("BF16", "F16", "F32")
_MXFP4_GROUP = 32
_UNREAD = (
    ".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".activation_scale", ".input_scale",
    ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
"""Endings of tensors that belong to ways of quantizing which are not read here."""


class Scheme(NamedTuple):
    """One way in which compressed-tensors stores a matrix."""

    bits: int
    is_float: bool
    strategy: str
    group_size: int | None
    for_experts: bool
    """Whether its targets single out the routed experts, as the stock loader understands them."""


@dataclass(frozen=True)
class Unpacked:
    """The dense tensors of a quantized checkpoint, and what the stock quantizer hooks are told to get them."""

    stored_as: str
    tensors: dict[str, TensorHeader]
    dtype: str
    """The model's dtype, as config.json spells it."""
    loading: dict[str, Any] = field(default_factory=dict[str, Any])
    """A quantization_config of checked values only; nothing else of the source's own reaches the stock hooks."""


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Say whether config.json speaks of quantization."""
    return any(config.get(key) for key in QUANTIZATION_KEYS)


def unpack_headers(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> Unpacked:
    """Return what the tensors of a quantized model are once unpacked, or refuse how they are stored."""
    quantization = _checked_config(config)
    method = str(quantization.get("quant_method"))[:40]
    dtype = _model_dtype(architecture, config, tensors)
    match method:
        case "fp8":
            dense, loading = _fp8(quantization, tensors, _CONFIG_DTYPES[dtype])
        case "mxfp4":
            dense, loading = dict(_mxfp4(architecture, tensors, _CONFIG_DTYPES[dtype])), {}
        case "compressed-tensors":
            dense, loading = _compressed(architecture, quantization, tensors, _CONFIG_DTYPES[dtype])
        case _:
            _refuse(f"quant_method {method!r}")
    packed = {name for name, header in dense.items() if tensors.get(name) is not header}
    if not packed:
        raise BrokenCheckpoint(f"config.json has a quantization_config for {method}, but no tensor is stored that way")
    _check_experts_alike(architecture, dense, packed)
    loading |= {"quant_method": method, **({} if method == "compressed-tensors" else {"dequantize": True})}
    return Unpacked(method, dense, dtype, loading)


def _checked_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    quantization: object = config.get("quantization_config")
    if not isinstance(quantization, dict):
        _refuse("a compression_config without it" if not quantization else "a value that is no object")
    members = cast("dict[str, Any]", quantization)
    for key in ("load_in_4bit", "load_in_8bit", "modules_to_convert", "sparsity_config", "transform_config", "kv_cache_scheme"):
        if members.get(key):
            _refuse(f"a model with {key}")
    return members


def _refuse(found: str) -> NoReturn:
    raise QuantizedSource(
        f"quantization_config in config.json: {found} is not read. Read are {METHODS}; "
        "start from one of those, or from the original model"
    )


def _model_dtype(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> str:
    """Return the dtype of the dense model: config.json's, or the embedding's where it is silent."""
    named: object = config.get("dtype") or config.get("torch_dtype")
    if not named:
        embedding = tensors.get(f"{architecture.embedding}.weight")
        named = next((name for name, dtype in _CONFIG_DTYPES.items() if embedding and dtype == embedding.dtype), None)
    if not isinstance(named, str) or named not in _CONFIG_DTYPES:
        raise BrokenCheckpoint(f"config.json has no proper dtype for the unpacked weights: {str(named)[:40]!r}")
    return named


def _fp8(
    quantization: Mapping[str, Any], tensors: Mapping[str, TensorHeader], dtype: str
) -> tuple[dict[str, TensorHeader], dict[str, Any]]:
    sizes = quantization.get("weight_block_size")
    block = tuple(cast("list[object]", sizes)) if isinstance(sizes, list) else ()
    if len(block) != 2 or not all(_is_count(size) for size in block):
        _refuse("fp8 without a weight_block_size of two sizes")
    rows, columns = cast("tuple[int, int]", block)
    if quantization.get("activation_scheme", "dynamic") != "dynamic":
        _refuse("fp8 with static activations")
    dense: dict[str, TensorHeader] = {}
    for name, header in tensors.items():
        if name.endswith(".weight_scale_inv"):
            _check_owner(tensors, name, name.removesuffix("_scale_inv"), "F8_E4M3")
        elif header.dtype == "F8_E4M3":
            shape = _matrix(header)
            grid = (-(-shape[0] // rows), -(-shape[1] // columns))
            _scale(tensors, f"{name}_scale_inv", (grid,))
            dense[name] = _dense(header, name, dtype, shape)
        else:
            dense[name] = _unquantized(header)
    return dense, {"weight_block_size": [rows, columns]}


def _mxfp4(architecture: Architecture, tensors: Mapping[str, TensorHeader], dtype: str) -> Iterator[tuple[str, TensorHeader]]:
    for name, header in tensors.items():
        if name.endswith("_scales"):
            _check_owner(tensors, name, f"{name.removesuffix('_scales')}_blocks", "U8")
        elif name.endswith("_blocks"):
            if header.dtype != "U8" or len(header.shape) != 4 or header.shape[3] != _MXFP4_GROUP // 2:
                raise BrokenCheckpoint(f"tensor {name!r} is {header.dtype} {list(header.shape)}, not U8 [E, R, G, 16]")
            target = name.removesuffix("_blocks")
            if not architecture.fused_on_disk or architecture.component_of(target) != "experts":
                raise QuantizedSource(f"tensor {name!r} is not one of fused experts; mxfp4 is read in those of gpt_oss")
            scales = _needed(tensors, f"{target}_scales")
            if scales.dtype != "U8" or scales.shape != header.shape[:3]:
                raise BrokenCheckpoint(f"tensor {scales.name!r} is not U8 {list(header.shape[:3])}, one scale per group of 32")
            experts, rows, groups, _ = header.shape
            _check_free(tensors, target)
            yield target, _dense(header, target, dtype, (experts, _MXFP4_GROUP * groups, rows))
        else:
            yield name, _unquantized(header)


def _compressed(
    architecture: Architecture, quantization: Mapping[str, Any], tensors: Mapping[str, TensorHeader], dtype: str
) -> tuple[dict[str, TensorHeader], dict[str, Any]]:
    if quantization.get("quantization_status") != "compressed":
        _refuse("compressed-tensors whose quantization_status is not compressed")
    schemes = tuple(_schemes(quantization))
    dense: dict[str, TensorHeader] = {}
    found: dict[Scheme, list[str]] = {}
    expert_schemes: set[Scheme] = set()
    for name, header in tensors.items():
        if name.endswith((".weight_scale", ".weight_shape")):
            module = name.rpartition(".")[0]
            if f"{module}.weight_packed" not in tensors:
                _check_owner(tensors, name, f"{module}.weight", "F8_E4M3")
            continue
        if not name.endswith(".weight_packed") and header.dtype != "F8_E4M3":
            dense[name] = _unquantized(header)
            continue
        module = name.rpartition(".")[0]
        component = architecture.component_of(name)
        if component in ("router", "other"):
            raise QuantizedSource(f"tensor {name!r} is no linear layer's nor an expert's; compressed-tensors is read in those")
        is_expert = architecture.expert_of(name) is not None
        scheme, shape = _fitting(header, tensors, _candidates(schemes, is_expert=is_expert))
        if name != f"{module}.weight":
            _check_free(tensors, f"{module}.weight")
        dense[f"{module}.weight"] = _dense(header, f"{module}.weight", dtype, shape)
        if is_expert:
            expert_schemes.add(scheme)
        else:
            found.setdefault(scheme, []).append(module)
    # The stock loader finds the experts' scheme by a pattern that names them; everything else is named outright.
    groups = [_group(scheme, [r"re:.*\.experts\..*"]) for scheme in expert_schemes]
    groups += [_group(scheme, modules) for scheme, modules in found.items()]
    return dense, {
        "format": groups[0]["format"] if len({group["format"] for group in groups}) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [],
    }


def _schemes(quantization: Mapping[str, Any]) -> Iterator[Scheme]:
    groups: object = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _refuse("compressed-tensors without config_groups")
    for group in cast("dict[str, object]", groups).values():
        members = cast("dict[str, Any]", group) if isinstance(group, dict) else {}
        weights, targets = members.get("weights"), members.get("targets")
        if not isinstance(weights, dict) or not isinstance(targets, list):
            _refuse("compressed-tensors with a config group that lacks weights or targets")
        names = [target for target in cast("list[object]", targets) if isinstance(target, str)]
        for_experts = any(name.startswith("re:") and "experts" in name for name in names)
        yield _scheme(cast("dict[str, Any]", weights), members.get("format") or quantization.get("format"), for_experts)


def _scheme(weights: Mapping[str, Any], layout: object, for_experts: bool) -> Scheme:
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    size = weights.get("group_size")
    if weights.get("symmetric") is not True or weights.get("actorder") not in (None, "static", "weight"):
        _refuse("compressed-tensors with asymmetric or reordered weights")
    if layout == "pack-quantized" and kind == "int" and type(bits) is int and bits in (4, 8):
        if strategy == "channel" and size in (None, -1):
            return Scheme(bits, False, "channel", None, for_experts)
        if strategy == "group" and _is_count(size):
            return Scheme(bits, False, "group", cast("int", size), for_experts)
    if layout == "float-quantized" and kind == "float" and type(bits) is int and bits == 8 and strategy in ("channel", "tensor"):
        return Scheme(bits, True, cast("str", strategy), None, for_experts)
    _refuse(f"compressed-tensors as {str(layout)[:40]}, {str(kind)[:20]} of {str(bits)[:20]} bits by {str(strategy)[:20]}")


def _candidates(schemes: tuple[Scheme, ...], *, is_expert: bool) -> tuple[Scheme, ...]:
    """Return the schemes that a tensor may have: the stock loader takes one for all experts, and finds it by its targets."""
    return tuple(scheme for scheme in schemes if scheme.for_experts)[:1] or schemes[:1] if is_expert else schemes


def _fitting(
    header: TensorHeader, tensors: Mapping[str, TensorHeader], schemes: tuple[Scheme, ...]
) -> tuple[Scheme, tuple[int, int]]:
    """Return the one scheme that explains a tensor's shapes, and the dense shape; BrokenCheckpoint if none does."""
    fits = {scheme: shape for scheme in schemes if (shape := _shape_by(scheme, header, tensors))}
    if not fits:
        raise BrokenCheckpoint(f"tensor {header.name!r} of shape {list(header.shape)} and its scale fit no scheme in config.json")
    if len(set(fits.values())) > 1:
        # Rows of 4 bits look like rows of 8 and half the length; a scheme made for the experts is then the less likely.
        fits = {scheme: shape for scheme, shape in fits.items() if not scheme.for_experts}
    if len(set(fits.values())) != 1:
        raise QuantizedSource(
            f"tensor {header.name!r} could be stored by several of the schemes in config.json; its shape does not say which"
        )
    return next(iter(fits.items()))


def _shape_by(scheme: Scheme, header: TensorHeader, tensors: Mapping[str, TensorHeader]) -> tuple[int, int] | None:
    """Return the dense shape of a tensor that was stored by this scheme, None where its shapes contradict it."""
    if scheme.is_float != (header.dtype == "F8_E4M3"):
        return None
    rows, words = _matrix(header)
    module = header.name.rpartition(".")[0]
    if scheme.is_float:
        allowed = ((rows, 1),) if scheme.strategy == "channel" else ((1,), ())
        return (rows, words) if _scale(tensors, f"{module}.weight_scale").shape in allowed else None
    shape = _needed(tensors, f"{module}.weight_shape")
    if header.dtype != "I32" or shape.dtype != "I64" or shape.shape != (2,):
        raise BrokenCheckpoint(f"tensor {header.name!r} is not I32 with a weight_shape of two I64")
    columns = words * 32 // scheme.bits
    groups = 1 if scheme.group_size is None else -(-columns // scheme.group_size)
    exact = scheme.group_size is None or columns % scheme.group_size == 0
    return (rows, columns) if exact and _scale(tensors, f"{module}.weight_scale").shape == (rows, groups) else None


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": True,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "format": "float-quantized" if scheme.is_float else "pack-quantized", "weights": weights}


def _check_experts_alike(architecture: Architecture, dense: Mapping[str, TensorHeader], packed: set[str]) -> None:
    """Refuse a block whose gate and up, or whose down, are packed in some experts and dense in others: they are fused."""
    down = f".{architecture.gate_up_down[2]}."
    seen: dict[tuple[int | None, bool], bool] = {}
    for name in dense:
        if architecture.expert_of(name) is not None:
            place = (architecture.block_of(name), down in name)
            if seen.setdefault(place, name in packed) != (name in packed):
                raise BrokenCheckpoint(f"tensor {name!r} is not stored as the same matrices of the block's other experts are")


def _unquantized(header: TensorHeader) -> TensorHeader:
    if header.name.endswith(_UNREAD):
        raise QuantizedSource(f"tensor {header.name!r} belongs to a way of quantizing that is not read; read are {METHODS}")
    return header


def _check_owner(tensors: Mapping[str, TensorHeader], name: str, owner: str, dtype: str) -> None:
    if _needed(tensors, owner).dtype != dtype:
        raise BrokenCheckpoint(f"tensor {name!r} has nothing to scale: {owner!r} is not {dtype}")


def _check_free(tensors: Mapping[str, TensorHeader], name: str) -> None:
    if name in tensors:
        raise BrokenCheckpoint(f"tensor {name!r} is there twice, packed and unpacked")


def _needed(tensors: Mapping[str, TensorHeader], name: str) -> TensorHeader:
    if name not in tensors:
        raise BrokenCheckpoint(f"tensor {name!r} is missing")
    return tensors[name]


def _scale(tensors: Mapping[str, TensorHeader], name: str, shapes: tuple[tuple[int, ...], ...] | None = None) -> TensorHeader:
    scale = _needed(tensors, name)
    if scale.dtype not in _SCALE_DTYPES:
        raise QuantizedSource(f"tensor {name!r} is stored as {scale.dtype}; scales are read as {', '.join(_SCALE_DTYPES)}")
    if shapes is not None and scale.shape not in shapes:
        raise BrokenCheckpoint(f"tensor {name!r} is of shape {list(scale.shape)}; its weight means {list(shapes[0])}")
    return scale


def _matrix(header: TensorHeader) -> tuple[int, int]:
    if len(header.shape) != 2 or not all(header.shape):
        raise BrokenCheckpoint(f"tensor {header.name!r} of shape {list(header.shape)} is no matrix, but quantized")
    return header.shape[0], header.shape[1]


def _dense(header: TensorHeader, name: str, dtype: str, shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(name, dtype, shape, header.file, 0, prod(shape) * DTYPE_BITS[dtype] // 8)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31
