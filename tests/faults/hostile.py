"""Checkpoints as nobody should write them: a sound model of any family, and one to three things wrong with it.

Everything is drawn from one generator, so a case is known by its seed. A case is a ``Draft``, which ``write`` puts into
a folder: values are changed before bytes are made of them, bytes afterwards, and the folder's own tricks come last.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from compression.architectures import ARCHITECTURES, REFUSED
from compression.checkpoint.headers import DTYPE_BITS
from tests.compression.made_checkpoints import Config, Tensors
from tests.faults.made_families import FAMILIES, made

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MOST_ON_DISK = 2**36
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, -(10**40), 10**4000, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), True, False,
]  # fmt: skip
VALUES: list[Any] = [
    *NUMBERS, None, "", "8", "..", "a" * 5000,
    "\ud800", "\0", [], {}, [[]], [None], [8], [8] * 4, [8, "x", None, 4], ["dense"] * 4,
    ["sparse"] * 3, ["sparse"] * 4, {"a": 1}, {"text_config": {}}, [2**70] * 4, [float("nan")] * 4, ["\ud800"] * 4, [True] * 4,
]  # fmt: skip
KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts",
    "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_topk", "moe_k", "n_group", "topk_group",
    "num_expert_group",
    "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "mlp_only_layers", "decoder_sparse_step",
    "mlp_layer_types", "layer_types", "sliding_window", "use_sliding_window", "tie_word_embeddings", "expert_layer_period",
    "expert_layer_offset", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "dtype", "torch_dtype",
    "text_config", "thinker_config", "quantization_config", "compression_config", "auto_map", "architectures", "slimtrim",
    "model_type", "kv_lora_rank", "rope_scaling", "shared_expert_intermediate_size", "num_shared_expert",
)  # fmt: skip
PLACES = [
    "../x.safetensors", "/etc/passwd", "/etc/x.safetensors", "..", ".", "", "x\\y.safetensors", "a/b.safetensors",
    "\0.safetensors",
    "MODEL.SAFETENSORS", "gone.safetensors", "model.bin", "x" * 300 + ".safetensors", "\u202e.safetensors", "\ud800.safetensors",
    CONFIG, INDEX, 7, None, [], {},
]  # fmt: skip
NAMES = [
    "..", "/etc/passwd", "a\0b", "\ud800", "", "x" * 2**20, "model.layers.999999999999999999.mlp.gate.weight",
    "model.layers." + "9" * 400 + ".mlp.gate.weight", "model.layers.-1.mlp.gate.weight", "model.layers.\u0663.mlp.gate.weight",
    "model.layers.00.mlp.gate.weight", "model.layers.0.mlp.experts.\u0661.gate_proj.weight", "model.layers.0.", "model.layers.0",
    "model.layers.0.mlp.experts.77777777777777777777.gate_proj.weight", "lm_head.weight.weight", "\u202e", "mtp.0.x",
    "__metadata__",
    "model.layers.0.self_attn.q_proj.weight_packed", "model.layers.0.self_attn.q_proj.weight_scale_inv", "model.layers.4.x",
]  # fmt: skip


@dataclass
class Draft:
    """A checkpoint that is being spoilt."""

    config: Config
    tensors: Tensors
    entries: dict[str, Any] = field(default_factory=dict[str, Any])
    """Header entries that are written as they are, instead of the tensors' own."""
    config_bytes: Callable[[bytes], bytes] | None = None
    header_bytes: Callable[[bytes], bytes] | None = None
    length: Callable[[int], int] | None = None
    data_bytes: Callable[[int], int] | None = None
    weight_map: object = None
    """With one, the file is written as a shard beside an index."""
    trick: Callable[[Path], object] | None = None


def draw(random: Random) -> tuple[str, Draft]:
    """Return a case: what was done, and the draft."""
    config, tensors = made(random.choice(FAMILIES))
    draft = Draft(config, tensors)
    kinds = [random.choice(_OFTEN if random.random() < 0.998 else _DEAR) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    for kind in kinds:
        kind(random, draft)
    return "+".join(sorted({kind.__name__.strip("_") for kind in kinds})), draft


def write(draft: Draft, folder: Path) -> Path:
    """Write the case into an empty folder and return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.dumps(draft.config).encode()
    (folder / CONFIG).write_bytes(config if draft.config_bytes is None else draft.config_bytes(config))
    header, data = _header(draft)
    raw = json.dumps(header).encode()
    raw = raw if draft.header_bytes is None else draft.header_bytes(raw)
    length = len(raw) if draft.length is None else draft.length(len(raw)) % 2**64
    data = data if draft.data_bytes is None else max(0, draft.data_bytes(data))
    file = WEIGHTS
    if draft.weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": draft.weight_map}))
        file = "one.safetensors"
    with (folder / file).open("wb") as out:
        out.write(struct.pack("<Q", length) + raw)
        out.truncate(8 + len(raw) + min(data, _MOST_ON_DISK))
    if draft.trick is not None:
        draft.trick(folder)
    return folder


def _header(draft: Draft) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in draft.tensors.items():
        begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header | draft.entries, end


def _settings_of(draft: Draft) -> Config:
    row = ARCHITECTURES.get(draft.config["model_type"]) if isinstance(draft.config.get("model_type"), str) else None
    inside: Any = draft.config
    for key in row.text_config if row is not None else ():
        inside = inside.get(key) if isinstance(inside, dict) else None
    return inside if isinstance(inside, dict) else draft.config


def _config_value(random: Random, draft: Draft) -> None:
    settings = _settings_of(draft) if random.random() < 0.9 else draft.config
    settings[random.choice((*KEYS, *list(settings)))] = random.choice(VALUES)


def _config_number(random: Random, draft: Draft) -> None:
    settings = _settings_of(draft)
    counts = [key for key, value in settings.items() if isinstance(value, int | list)] or ["hidden_size"]
    settings[random.choice(counts)] = random.choice(NUMBERS)


def _config_without(random: Random, draft: Draft) -> None:
    settings = _settings_of(draft)
    if settings:
        del settings[random.choice(list(settings))]


def _config_lists(random: Random, draft: Draft) -> None:
    key = random.choice(("layer_types", "mlp_layer_types", "mlp_only_layers", "layer_rope_theta", "moe_topk"))
    item = random.choice((*VALUES, "sparse", "dense", "sliding_attention", "linear_attention", 2))
    _settings_of(draft)[key] = [item] * random.choice((0, 1, 3, 4, 5, 1000))


def _quantization(random: Random, draft: Draft) -> None:
    method = random.choice(("fp8", "mxfp4", "compressed-tensors", "gptq", random.choice(VALUES)))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    weights[random.choice(list(weights))] = random.choice(VALUES)
    group = {"targets": random.choice((["Linear"], ["re:(a+)+$"], random.choice(VALUES))), "weights": weights}
    said: Config = {
        "quant_method": method, "weight_block_size": [32, 32], "quantization_status": "compressed",
        "format": random.choice(("pack-quantized", "float-quantized", random.choice(VALUES))),
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    if random.random() < 0.5:
        said[random.choice(list(said))] = random.choice(VALUES)
    draft.config["quantization_config"] = said
    for name in random.sample(list(draft.tensors), min(6, len(draft.tensors))):
        dtype, shape = draft.tensors[name]
        if len(shape) == 2:
            stem = name.removesuffix("weight")
            draft.tensors[name] = ("F8_E4M3", shape)
            scale = random.choice((1, 32, 64))
            draft.tensors[f"{stem}weight_scale_inv"] = ("F32", (-(-shape[0] // 32), -(-shape[1] // 32)))
            draft.tensors[f"{stem}weight_scale"] = (dtype, (shape[0], scale))
            draft.tensors[f"{stem}weight_packed"] = ("I32", (shape[0], shape[1] // 8))
            draft.tensors[f"{stem}weight_shape"] = ("I64", (2,))


def _model_type(random: Random, draft: Draft) -> None:
    draft.config["model_type"] = random.choice((*sorted(REFUSED), *FAMILIES, "llama", "own", "x" * 10**5, *VALUES))
    if random.random() < 0.5:
        draft.config["auto_map"] = random.choice(({"AutoModel": "own.Model"}, *VALUES))


def _config_text(random: Random, draft: Draft) -> None:
    spoil: list[Callable[[bytes], bytes]] = [
        lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: raw + b"}", lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.replace(b'"hidden_size"', b'"num_hidden_layers"'), lambda raw: raw.replace(b"64", b"9" * 6000),
        lambda raw: raw.replace(b"64", b"NaN"), lambda raw: b"[" * 10**5, lambda raw: b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        lambda raw: raw[:-1] + b', "x": ' + b"[" * 400 + b"]" * 400 + b"}", lambda raw: raw.decode().encode("utf-16"),
        lambda raw: raw[:-1] + b', "x": "\xff\xfe"}', lambda raw: raw[:-1] + b', "x": "\\ud800"}', lambda raw: bytes(len(raw)),
        lambda raw: b"null", lambda raw: b"\x80\x04K\x01.", lambda raw: raw[:-1] + b', "x": 1e999999, "y": -1e-999999}',
    ]  # fmt: skip
    draft.config_bytes = random.choice(spoil)


def _length_field(random: Random, draft: Draft) -> None:
    claim = random.choice((0, 1, 2, 7, 2**63, 2**64 - 1, 10**8, 10**8 + 1, 2**31, -1, -2))
    draft.length = random.choice(
        (lambda _: claim, lambda length: length + 1, lambda length: length - 1, lambda length: length * 2)
    )


def _header_text(random: Random, draft: Draft) -> None:
    where, byte = random.random(), random.randrange(256)
    spoil: list[Callable[[bytes], bytes]] = [
        lambda raw: raw[: int(len(raw) * where)], lambda raw: b"", lambda raw: bytes(len(raw)), lambda raw: b"[" * 10**5,
        lambda raw: raw[: int(len(raw) * where)] + bytes([byte]) + raw[int(len(raw) * where) + 1 :],
        lambda raw: raw.replace(b"BF16", b"\xff\xff16", 1), lambda raw: raw.replace(b"[64", b"[" + b"6" * 5000, 1),
        lambda raw: raw.replace(b"[64", b"[NaN", 1), lambda raw: raw.replace(b"[64", b"[6.4e1", 1), lambda raw: raw[:-1],
        lambda raw: raw + b" " * 10**6, lambda raw: raw[:1] + raw[1:-1] + b"," + raw[1:-1] + b"}", lambda raw: b"\n" + raw,
        lambda raw: b'{"a":' * 3000 + raw + b"}" * 3000, lambda raw: raw.decode().encode("utf-16"), lambda raw: b"null",
    ]  # fmt: skip
    draft.header_bytes = random.choice(spoil)


def _entry(random: Random, draft: Draft) -> None:
    if not draft.tensors:
        return
    name = random.choice(list(draft.tensors))
    header, _ = _header(draft)
    entry = dict(header[name]) if isinstance(header[name], dict) else {}
    part = random.choice(("dtype", "shape", "data_offsets", "shape", "data_offsets", "whole"))
    sizes = [random.choice((*NUMBERS, 64)) for _ in range(random.choice((0, 1, 2, 2, 2, 3, 17, 1000)))]
    entry[part] = (
        random.choice((*VALUES, *DTYPE_BITS)) if part == "dtype" else random.choice((sizes, sizes, random.choice(VALUES)))
    )
    draft.entries[name] = entry["whole"] if part == "whole" else entry


def _data(random: Random, draft: Draft) -> None:
    more = random.choice((-(10**12), -100, -1, 1, 8, 10**6, 2**35))
    draft.data_bytes = lambda size: size + more


def _name(random: Random, draft: Draft) -> None:
    new, old = random.choice(NAMES), random.choice(list(draft.tensors) or ["a"])
    draft.tensors[new] = draft.tensors.pop(old, ("BF16", (2, 2))) if random.random() < 0.5 else ("F32", (3,))


def _shape(random: Random, draft: Draft) -> None:
    name = random.choice(list(draft.tensors) or ["a"])
    dtype, shape = draft.tensors.get(name, ("BF16", (2,)))
    sizes = [random.choice((size, size, 0, 1, 3, 63, 64, 65, 4096, 2**20)) for size in shape]
    shapes = [tuple(sizes), shape[:-1], (*shape, 1), (1, *shape), (), shape[::-1], (0,), (1,) * 16]
    draft.tensors[name] = (random.choice((dtype, *DTYPE_BITS)) if random.random() < 0.3 else dtype, random.choice(shapes))
    if sum(prod(shape) for _, shape in draft.tensors.values()) > 2**34:
        draft.tensors[name] = (dtype, shape)


def _missing(random: Random, draft: Draft) -> None:
    for name in random.sample(list(draft.tensors), min(len(draft.tensors), random.choice((1, 1, 2, 20)))):
        del draft.tensors[name]


def _weight_map(random: Random, draft: Draft) -> None:
    places: Any = dict.fromkeys(draft.tensors, "one.safetensors")
    for _ in range(random.choice((0, 1, 2))):
        places[random.choice((*list(draft.tensors), *NAMES[:5]))] = random.choice(PLACES)
    draft.weight_map = random.choice((places, places, places, random.choice(VALUES)))


def _folder(random: Random, draft: Draft) -> None:
    file = random.choice((CONFIG, WEIGHTS, INDEX, "one.safetensors"))

    def swap(target: str) -> Callable[[Path], object]:
        def trick(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            os.symlink(target, folder / file)

        return trick

    def remake(make: Callable[[Path], object]) -> Callable[[Path], object]:
        def trick(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            make(folder / file)

        return trick

    tricks: list[Callable[[Path], object]] = [
        *map(swap, ("/etc/passwd", "/dev/zero", "/dev/tty", "/proc/self/mem", "gone", file, "../..", ".", f"x/../{file}")),
        *map(remake, (os.mkfifo, Path.mkdir, Path.touch, lambda path: None)),
        lambda folder: (folder / WEIGHTS).rename(folder / "model.bin") if (folder / WEIGHTS).exists() else None,
        lambda folder: (folder / file).rename(folder / file.upper()) if (folder / file).exists() else None,
        lambda folder: [(folder / f"{number}\n\x7f").touch() for number in range(50)],
        lambda folder: os.close(os.open(os.fsencode(folder) + b"/\xff\xfe.safetensors", os.O_CREAT | os.O_WRONLY)),
    ]
    draft.trick = random.choice(tricks)


def _many(random: Random, draft: Draft) -> None:
    """Tensors without number: as many as the limits let through, and more."""
    stem = random.choice(
        ("x{}", "model.layers.0.x{}", "model.layers.{}.x", "model.layers.0.mlp.experts.{}.gate_proj.weight", "mtp.{}")
    )
    count = random.choice((5_000, 9_000, 20_000, 60_000, 400_000))
    draft.tensors |= {stem.format(number): ("BF16", (1,)) for number in range(count)}


def _bulk(random: Random, draft: Draft) -> None:
    """Files that are mostly long."""
    size = random.choice((4, 12, 30, 31, 99, 101)) * 10**6
    letter = random.choice(("x", "\U0001f600"))
    filler = json.dumps(letter * (size // len(letter.encode())), ensure_ascii=False).encode()
    brackets = b"[" + b"[]," * (size // 3) + b"[]]"
    more = random.choice((filler, brackets))
    if random.random() < 0.5:
        draft.config_bytes = lambda raw: raw[:-1] + b', "x": ' + more + b"}"
    else:
        draft.header_bytes = lambda raw: raw[:-1] + b', "__metadata__": {"x": ' + more + b"}}"


_OFTEN = (
    _config_value, _config_value, _config_number, _config_number, _config_without, _config_lists, _quantization, _model_type,
    _config_text, _length_field, _header_text, _entry, _entry, _data, _name, _shape, _shape, _missing, _weight_map, _folder,
)  # fmt: skip
_DEAR = (_many, _bulk)
