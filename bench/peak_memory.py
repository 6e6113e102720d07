"""Peak resident memory of GPTQ on two checkpoints that differ only in their number of equal blocks.

    python bench/peak_memory.py [--blocks 12 48] [--folder FOLDER]

Writes Mixtral-shaped checkpoints of random bf16 weights (48 blocks: 4.2 GB), runs the whole pipeline on each in a
fresh process (plan, GPTQ W4A16 on every expert, evaluation by sweep, verification in windows of blocks) and prints
the peak of resident memory. The claim: four times the blocks need at most one block more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = {"hidden_size": 1024, "intermediate_size": 1792, "num_local_experts": 8}
REQUEST = {
    "recipe": {"steps": [{"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 128}]},
    "calibration": {"samples": 16, "sequence_length": 256},
    "evaluation": {"perplexity": {"samples": 4}},
}


def write_checkpoint(folder: Path, blocks: int) -> int:
    """Write a random checkpoint shard by shard; return the bytes of one block."""
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    from tests.tiny_models import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = MixtralConfig(**BLOCK, num_hidden_layers=blocks, num_attention_heads=16, num_key_value_heads=4, vocab_size=512)
    config.architectures, config.dtype = ["MixtralForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    build_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    width, inner = BLOCK["hidden_size"], BLOCK["intermediate_size"]
    outside = {"model.embed_tokens.weight": random(512, width), "lm_head.weight": random(512, width)}
    outside["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
    weight_map = dict.fromkeys(outside, "outside.safetensors")
    save_file(outside, folder / "outside.safetensors", {"format": "pt"})
    size = 0
    for block in range(blocks):
        at = f"model.layers.{block}"
        heads = {"q_proj": width, "k_proj": width // 4, "v_proj": width // 4, "o_proj": width}
        tensors = {f"{at}.self_attn.{name}.weight": random(rows, width) for name, rows in heads.items()}
        tensors |= {
            f"{at}.{n}.weight": torch.ones(width, dtype=torch.bfloat16) for n in ("input_layernorm", "post_attention_layernorm")
        }
        tensors[f"{at}.block_sparse_moe.gate.weight"] = random(8, width)
        for expert in range(8):
            for matrix, shape in {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}.items():
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{matrix}.weight"] = random(*shape)
        save_file(tensors, folder / f"block-{block}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"block-{block}.safetensors")
        size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return size


def run(folder: Path) -> None:
    """Compress in this process and print its peak."""
    import shutil

    from compression.pipeline import compress
    from compression.request import Compression

    out = folder.with_name(folder.name + "-out")
    shutil.rmtree(out, ignore_errors=True)
    # A budget far below the model: verification must open it in windows.
    report = compress(Compression.model_validate({"model": folder.as_uri(), **REQUEST}), folder, out, host_memory=2**20)
    assert report.verification.mode == "windows"
    shutil.rmtree(out)
    print(json.dumps({"peak": report.peak_memory_bytes["resident"], "seconds": report.seconds, "bytes": report.bytes_before}))


def main() -> None:
    """Write both checkpoints, compress each in its own process, and compare the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=[12, 48])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "slimtrim-peak")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run)
        return
    peaks = []
    for blocks in given.blocks:
        folder = given.folder / f"{blocks}-blocks"
        size = write_checkpoint(folder, blocks)
        done = subprocess.run([sys.executable, __file__, "--run", str(folder)], check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        peaks.append(result["peak"])
        print(f"{blocks} blocks, {result['bytes'] / 1e9:.2f} GB: peak {result['peak'] / 1e6:.0f} MB, seconds {result['seconds']}")
    print(f"difference {(peaks[1] - peaks[0]) / 1e6:.1f} MB; one block is {size / 1e6:.1f} MB")
    if peaks[1] - peaks[0] > size:
        sys.exit("the larger checkpoint needs more than one block more")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
