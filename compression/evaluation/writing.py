"""``python -m compression.evaluation.writing``: one model continues prompts greedily, in a process of its own.

Prompts of a batch are padded on the left, with a mask, and keep their own positions. The settings of generation that the
model carries are not used but for the tokens that end an answer: a repetition penalty would hide repetition.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from compression.evaluation.opened import open_whole
from compression.evaluation.process import Line, Say, serve


def work(given: Line, say: Say) -> Line:
    """Return, for each of the ``prompts``, the tokens that ``model`` writes and their text."""
    folder = Path(given["model"])
    model, tokenizer = open_whole(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    greedy = _greedy(model, tokenizer, given["new_tokens"])
    answers: list[list[int]] = []
    for start in range(0, len(given["prompts"]), given["batch_size"]):
        batch = tokenizer(given["prompts"][start : start + given["batch_size"]], return_tensors="pt", padding=True)
        asked = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            written = model.generate(**asked, generation_config=greedy)
        answers += [_until_end(row, greedy.eos_token_id or ()) for row in written[:, batch.input_ids.shape[1] :].tolist()]
        say(len(answers), len(given["prompts"]))
    return {"tokens": answers, "texts": [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]}


def _greedy(model: Any, tokenizer: Any, new_tokens: int) -> GenerationConfig:
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else ends
    pad = tokenizer.pad_token_id
    return GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=pad)


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Return an answer without the token that ended it and the padding behind that."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


if __name__ == "__main__":
    sys.exit(serve(work))
