"""How long a search takes once a study has priced everything, for the shapes of two large models; no weights are needed.

    python -m bench.planning_time [--rounds 3]

The shapes are those of Qwen3-30B-A3B (48 blocks of 128 experts) and DeepSeek-V3 (61 blocks, 58 of 256 experts); prices are made
up, 66 pairs of drops among them. Per profile: the first plan, with all that has to be prepared for it; each of five more
targets; a frontier of 13 points; rivals of one plan. Processor seconds, medians over the rounds, each with other prices.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from compression.planner.inventory import Inventory, take_inventory
from compression.planner.levers import levers_of
from compression.planner.search import Search
from compression.recipe import Profile
from compression.request import Serving
from tests.compression.made_checkpoints import Config, Tensors, checkpoint
from tests.compression.made_prices import made_prices

TARGETS = (0.9, 0.55, 0.35, 0.27, 0.2, 0.14)
POINTS = 13
_GATED = ("gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("model | profile | first plan | next plan, median | and worst | frontier | plan and frontier | rivals | worst gap")
    for name, model in (("48 x 128", qwen3()), ("61 x 256", deepseek_v3())):
        start = time.process_time()
        inventory = take_inventory(checkpoint(*model))
        print(f"{name}: inventory in {time.process_time() - start:.2f} s")
        profiles: tuple[Profile, ...] = ("portable", "custom")
        for profile in profiles:
            found = [_times(inventory, profile, seed) for seed in range(rounds)]
            print(f"{name} | {profile} | " + " | ".join(f"{median(column):.2g}" for column in zip(*found, strict=True)))


def _times(inventory: Inventory, profile: Profile, seed: int) -> tuple[float, ...]:
    prices = made_prices(inventory, levers_of(inventory), seed=seed)
    targets = [round(share * inventory.bytes) for share in TARGETS]
    start = time.process_time()
    search = Search(inventory, Serving(), profile, prices)
    search.best(targets[-1])
    first = time.process_time() - start
    plans = [_seconds(lambda target=target: search.best(target)) for target in targets[:-1]]
    start = time.process_time()
    frontier = search.frontier(POINTS)
    seconds = time.process_time() - start
    rivals = _seconds(lambda: search.rivals(targets[-1]))
    return first, median(plans), max(plans), seconds, first + seconds, rivals, max(plan.gap for plan in frontier)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def qwen3() -> tuple[Config, Tensors]:
    """Return the headers of a model in the shape of Qwen3-30B-A3B."""
    hidden, width, experts = 2048, 768, 128
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": hidden, "intermediate_size": 6144,
        "moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = _outside(hidden, 151936)
    for index in range(48):
        block = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (4096, hidden), "self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden),
            "self_attn.o_proj": (hidden, 4096), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
            "mlp.gate": (experts, hidden),
        }  # fmt: skip
        for expert in range(experts):
            block |= _gated(f"mlp.experts.{expert}", hidden, width)
        tensors |= {f"model.layers.{index}.{place}.weight": ("BF16", shape) for place, shape in block.items()}
    return config, tensors


def deepseek_v3() -> tuple[Config, Tensors]:
    """Return the headers of a model in the shape of DeepSeek-V3, in 16 bits."""
    hidden, width, experts = 7168, 2048, 256
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": hidden, "intermediate_size": 18432,
        "moe_intermediate_size": width, "n_routed_experts": experts, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "first_k_dense_replace": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = _outside(hidden, 129280)
    for index in range(61):
        block = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_a_proj": (1536, hidden), "self_attn.q_a_layernorm": (1536,), "self_attn.q_b_proj": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa": (576, hidden), "self_attn.kv_a_layernorm": (512,),
            "self_attn.kv_b_proj": (32768, 512), "self_attn.o_proj": (hidden, 16384),
        }  # fmt: skip
        if index < 3:
            block |= _gated("mlp", hidden, 18432)
        else:
            block |= {"mlp.gate": (experts, hidden), **_gated("mlp.shared_experts", hidden, width)}
            tensors[f"model.layers.{index}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
            for expert in range(experts):
                block |= _gated(f"mlp.experts.{expert}", hidden, width)
        tensors |= {f"model.layers.{index}.{place}.weight": ("BF16", shape) for place, shape in block.items()}
    return config, tensors


def _outside(hidden: int, vocabulary: int) -> Tensors:
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return {f"{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def _gated(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{prefix}.{name}" for name in _GATED)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


if __name__ == "__main__":
    main()
