"""Tiny random checkpoints of every supported family, written by the stock classes.

``build("mixtral", folder)`` leaves a folder that ``from_pretrained`` opens: config, safetensors and a working
byte-level BPE tokenizer. They are small (4 blocks, 8 experts, width 64), but made so that faults show:

* expert width 128 beside hidden width 64, so a transposed matrix has the wrong shape; groups of 32 and 64 divide both;
* rotary width 16 or 32: at 8 or less a destroyed rotary table can pass;
* a sliding window of 8 tokens where the family has one, shorter than any sensible test sequence;
* both layer types where the family has two (sliding and full attention, dense and mixture blocks);
* every bias, norm weight, sink and correction bias random: a lost or swapped one changes the logits;
* weights of deviation 0.2: router logits spread over all experts and logits differ visibly.

Use sequences of at least 16 tokens, and one padded batch: without padding, full attention has no mask to get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.tiny_families import FAMILIES

BLOCKS = 4
EXPERTS = 8
TOP_K = 2
HIDDEN = 64
EXPERT_WIDTH = 128
DENSE_WIDTH = 192
WINDOW = 8
VOCABULARY = 384
BOS, EOS, PAD = 0, 1, 2
_KEPT_IN_FLOAT32 = "e_score_correction_bias"
_KEPT_AS_BUILT = ("slope_rate", "_decay")
"""Decays of linear attention, computed from the block's place and saved: random ones would grow without bound."""

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the cat watches from the window.",
    "A router sends every token to the experts that know it best, and the others rest.",
    "She sells sea shells on the sea shore; the shells she sells are surely sea shells.",
    "def load(path: str) -> bytes:\n    with open(path, 'rb') as file:\n        return file.read()\n",
    "In 1969 two people walked on the moon, and 600 million watched them on television.",
    "When the weights are small enough to fit the memory, the model can answer at last.",
    "Once upon a time there was a small house at the end of a long and winding road.",
    "Every statistic is a sum over tokens: counts, norms, products. Sums can be split.",
)


def build(
    model_type: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: int | str | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a tiny random checkpoint with its tokenizer and return the folder.

    ``model_type`` is one of MODEL_TYPES, MORE_MODEL_TYPES or VARIANTS; ``max_shard_size`` such as "500KB" gives several
    shards and an index. ``config_overrides`` are settings of the family's own config class.
    """
    model = _random_model(tiny_config(model_type, **config_overrides), getattr(torch, dtype), seed)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **sharding)
    build_tokenizer(folder)
    return folder


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return the tiny config of a family or variant; a setting that the family does not know is a TypeError."""
    if model_type in VARIANTS:
        model_type, variant = VARIANTS[model_type]
        overrides = {**variant, **overrides}
    known = AutoConfig.for_model(model_type)
    if unknown := [name for name in overrides if not hasattr(known, name)]:
        raise TypeError(f"{model_type} has no setting {', '.join(unknown)}")
    blocks = overrides.get("num_hidden_layers", BLOCKS)
    common = _common() if hasattr(known, "num_hidden_layers") else {}
    common = {name: value for name, value in common.items() if hasattr(known, name)}
    return AutoConfig.for_model(model_type, **{**common, **{**_FAMILIES, **FAMILIES}[model_type](blocks), **overrides})


def build_tokenizer(folder: Path) -> Path:
    """Write the tokenizer that goes with every tiny model: byte-level BPE that begins each text with BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    return folder


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _mixtral(blocks: int) -> dict[str, Any]:
    return {"intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS}


def _qwen2_moe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "shared_expert_intermediate_size": DENSE_WIDTH,
        "num_experts": EXPERTS,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _alternating(blocks),
    }


def _qwen3_moe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_local_experts": EXPERTS,
        "head_dim": 32,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "mlp_only_layers": [1],
    }


def _olmoe(blocks: int) -> dict[str, Any]:
    # 2 is about 1.3 deviations of a query or key: the clip is felt.
    return {"intermediate_size": EXPERT_WIDTH, "num_experts": EXPERTS, "clip_qkv": 2.0}


def _deepseek_v2(blocks: int) -> dict[str, Any]:
    return {**_deepseek(), "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}


def _deepseek_v3(blocks: int) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    scaling = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {**_deepseek(), "num_nextn_predict_layers": 0, "rope_parameters": {**yarn, **scaling}}


def _deepseek() -> dict[str, Any]:
    return {
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    }


def _gpt_oss(blocks: int) -> dict[str, Any]:
    # The gate and up values have a deviation near 1.6: a limit of 2 is felt, the usual 7 would not be.
    return {
        "intermediate_size": EXPERT_WIDTH,
        "num_local_experts": EXPERTS,
        "head_dim": 32,
        "swiglu_limit": 2.0,
        "sliding_window": WINDOW,
        "layer_types": _alternating(blocks),
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    }


def _phimoe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": EXPERT_WIDTH,
        "num_local_experts": EXPERTS,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "lm_head_bias": True,
    }


def _alternating(blocks: int) -> list[str]:
    return ["full_attention" if block % 2 else "sliding_attention" for block in range(blocks)]


_FAMILIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "phimoe": _phimoe,
}
MODEL_TYPES: tuple[str, ...] = tuple(_FAMILIES)
"""The eight families that every test over families runs over."""
MORE_MODEL_TYPES: tuple[str, ...] = tuple(FAMILIES)
"""The others, each with the compact tests of test_families.py."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral_sliding": ("mixtral", {"sliding_window": WINDOW}),
    "qwen2_moe_sparse_step": ("qwen2_moe", {"decoder_sparse_step": 2}),
}
"""Other shapes of a family: name -> (model_type, config settings). ``build`` takes these names too."""


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with _untouched_global_state():
        towers = hasattr(config, "vision_config") or hasattr(config, "thinker_config")
        auto: Any = AutoModelForMultimodalLM if towers else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _saved_tensors(model):
            if not name.endswith(_KEPT_AS_BUILT):
                tensor.copy_(_random_like(name, tensor, generator))
            if not name.endswith(_KEPT_IN_FLOAT32):
                tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def _saved_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    is_norm_weight = tensor.ndim == 1 and name.endswith("weight")
    if is_norm_weight:
        return 1.0 + 0.2 * noise
    return noise if "embed_tokens" in name else 0.2 * noise


@contextmanager
def _untouched_global_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@lru_cache(maxsize=1)
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return tokenizer.to_str()
