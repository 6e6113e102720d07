"""The llm-compressor side of bench.against_llm_compressor; run by an interpreter that has llm-compressor, never by ours.

    PEER/bin/python llm_compressor_oneshot.py whole REQUEST.json    one run from folder to artifact; JSON on the last line
    PEER/bin/python llm_compressor_oneshot.py solve                 its kernel function, driven by lines on standard input

Imports nothing of slimtrim. Everything that is not named in the request is the peer's own default.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
NOT_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*[.]gate$", "re:.*shared_expert.*"]
"""What is not quantized: the head, attention, routers, shared experts."""


def main() -> None:
    """Do what the command line asks for; only answers go to standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # progress bars and whatever else the libraries print
    if sys.argv[1] == "whole":
        answers.write(json.dumps(whole(json.loads(Path(sys.argv[2]).read_text()))) + "\n")
    else:
        solve(lambda answer: answers.write(json.dumps(answer) + "\n"))


def whole(request: dict[str, Any]) -> dict[str, Any]:
    """Compress one checkpoint as the request asks; return what it took and which kernel calls were made."""
    start = time.perf_counter()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    modifier, stacks = recipe(request), count_calls()
    imported = time.perf_counter()
    processor = time.process_time()
    with way_to_load() as apart_while_loading:
        model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=request["dtype"])
    loaded = time.perf_counter()
    ids_NS = load_file(request["ids"])["ids_NS"]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(request["model"]),
        dataset=Dataset.from_dict({"input_ids": ids_NS.tolist(), "attention_mask": torch.ones_like(ids_NS).tolist()}),
        recipe=modifier,
        num_calibration_samples=len(ids_NS),
        max_seq_length=ids_NS.shape[1],
        output_dir=request["out"],
        **request["oneshot"],
    )
    return {
        "import_seconds": imported - start,
        "seconds": time.perf_counter() - imported,
        "load_seconds": loaded - imported,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "apart_while_loading": int(apart_while_loading),
        "calls": len(stacks),
        "modules": sum(stacks),
        "largest_stack": max(stacks, default=0),
    }


@contextlib.contextmanager
def way_to_load() -> Iterator[bool]:
    """Load the way the peer recommends, with every expert's matrices apart from the start; say whether that works here.

    For some families it looks into every module of transformers, and stops at one that needs torchvision. Where that is
    missing, the model is loaded as it is and ``oneshot`` takes the experts apart.
    """
    if importlib.util.find_spec("torchvision") is None:
        yield False
        return
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe

    with load_quantizable_moe():
        yield True


def recipe(request: dict[str, Any]) -> Any:
    """Return GPTQ with 4-bit symmetric integers on the experts alone."""
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(request["group_size"]))
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=NOT_EXPERTS, **request["modifier"])


def arguments(group_size: int, **more: Any) -> Any:
    """Return the peer's own record of a 4-bit symmetric integer grid."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size, **more)


def count_calls() -> list[int]:
    """Return a list to which every call of the kernel function, from now on, adds how many modules it was given."""
    stacks: list[int] = []
    base = importlib.import_module("llmcompressor.modifiers.gptq.base")
    original = base.quantize_weight

    def counted(*args: Any, **kwargs: Any) -> Any:
        stacks.append(len(kwargs["weights"] if "weights" in kwargs else args[0]))
        return original(*args, **kwargs)

    base.quantize_weight = counted
    return stacks


def solve(answer: Callable[[dict[str, Any]], object]) -> None:
    """Time ``quantize_weight`` in one thread, as each line of standard input asks.

    ``load FILE GROUP`` takes weights, Gram matrices and scales; ``stacked`` and ``loop`` solve them in one call or one
    call per matrix and answer with processor seconds; ``save FILE`` writes the last result.
    """
    import torch
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    inputs: dict[str, Any] = {}
    options: dict[str, Any] = {}
    result = None
    for line in sys.stdin:
        verb, *words = line.split()
        seconds = 0.0
        if verb == "load":
            inputs = load_file(words[0])
            # "static" is the modifier's own default: loud inputs first, groups in the order of storage.
            options = {"global_scale": None, "quant_args": arguments(int(words[1]), actorder="static")}
        elif verb == "save":
            save_file({"weight_EOI": result.contiguous()}, words[0])
        else:
            size = len(inputs["weight_EOI"]) if verb == "stacked" else 1
            seconds, result = timed(quantize_weight, inputs, size, options)
        answer({"seconds": seconds})


def timed(kernel: Callable[..., Any], inputs: dict[str, Any], size: int, options: dict[str, Any]) -> tuple[float, Any]:
    """Return the processor seconds of solving ``size`` matrices per call, and the weights that came out."""
    import torch

    # The function works in the tensors it is given: it gets copies, made before the clock starts.
    parts = [tuple(inputs[name][i : i + size].clone() for name in ("weight_EOI", "gram_EII", "scale_EOG"))
             for i in range(0, len(inputs["weight_EOI"]), size)]  # fmt: skip
    done = []
    with torch.no_grad():
        start = time.process_time()
        for weights, hessians, scale in parts:
            done.append(kernel(weights, hessians, scale, torch.zeros_like(scale, dtype=torch.int8), **options)[0])
        seconds = time.process_time() - start
    return seconds, torch.cat(done)


if __name__ == "__main__":
    main()
