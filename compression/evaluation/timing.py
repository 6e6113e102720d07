"""``python -m compression.evaluation.timing``: how fast one model is at one batch size, in a process of its own.

Plain forward passes of stock transformers with its key-value cache. A round is a prefill of random tokens, then a fixed
number of greedy steps; no token ends it. The first round warms up and does not count.
"""

from __future__ import annotations

import inspect
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.evaluation.opened import engine, open_whole
from compression.evaluation.process import Line, Say, serve

_SEED = 0


def work(given: Line, say: Say) -> Line:
    """Return the times in seconds of every round's prefill and of every step, and the bytes in use."""
    model = open_whole(Path(given["model"]))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = given["batch_size"], given["context_tokens"]
    ids_BS = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(_SEED)).to(model.device)
    prefills, steps, cache = list[float](), list[float](), None
    for round_ in range(given["rounds"] + 1):
        if round_ == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # what opening and the first call needed is not what running needs
        prefill, stepped, cache = _round(model, ids_BS, given["new_tokens"])
        prefills, steps = ([], []) if round_ == 0 else ([*prefills, prefill], steps + stepped)
        say(round_ + 1, given["rounds"] + 1)
    return {
        "prefills": prefills,
        "steps": steps,
        "weights_bytes": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "kv_bytes": sum(tensor.nbytes for tensor in _tensors(cache, {})),
        "peak_bytes": _peak(),
        "engine": engine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _round(model: Any, ids_BS: Tensor, new_tokens: int) -> tuple[float, list[float], Any]:
    # As generate does: of a context, only the last token's logits are computed.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now()
    output = model(input_ids=ids_BS, use_cache=True, **last)
    next_B1 = output.logits[:, -1:].argmax(-1)
    prefill = _now() - start
    steps: list[float] = []
    for _ in range(new_tokens):
        start = _now()
        output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)
        next_B1 = output.logits[:, -1:].argmax(-1)
        steps.append(_now() - start)
    return prefill, steps, output.past_key_values


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _tensors(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """Yield every tensor that a cache holds, whatever its layers are made of; ``seen`` also keeps alive what it knows by id."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), seen)
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(serve(work))
