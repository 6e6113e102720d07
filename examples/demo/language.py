"""What a language model is judged by: a tokenizer, packed tokens, and perplexity beside a unigram model's.

The unigram model knows only how often each token occurs in the training part (add-one smoothing). Both models
are charged for the same tokens: every token of a window but its first, which nothing precedes.

Shapes: N windows, S tokens in a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer fitted to the texts; any text can be spelled in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Return the texts as one run of tokens, each text closed by the end token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def windows(ids_T: Tensor, length: int, *, offset: int = 0) -> Tensor:
    """Cut a run of tokens into whole windows [N, S], starting at ``offset``; the rest is left out."""
    ids_T = ids_T[offset:]
    count = len(ids_T) // length
    return ids_T[: count * length].view(count, length)


def unigram_perplexity(train_T: Tensor, heldout_NS: Tensor, vocabulary: int) -> float:
    """Return the held-out perplexity of add-one smoothed token frequencies."""
    counts_V = torch.bincount(train_T, minlength=vocabulary).double() + 1
    log_probability_V = (counts_V / counts_V.sum()).log()
    return math.exp(-log_probability_V[heldout_NS[:, 1:]].mean().item())


@torch.no_grad()
def perplexity(model: PreTrainedModel, heldout_NS: Tensor, *, batch: int = 16) -> float:
    """Return the model's held-out perplexity."""
    total = 0.0
    for ids_NS in heldout_NS.split(batch):
        logits_NSV = model(input_ids=ids_NS, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits_NSV.flatten(0, 1), ids_NS[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / heldout_NS[:, 1:].numel())
