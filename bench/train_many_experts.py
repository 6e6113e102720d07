"""Train a model of many small experts for the benches: a Qwen3-MoE of 8 blocks with 32 experts each, four of them used.

    python -m bench.train_many_experts FOLDER [--text ../shared/data/docs] [--minutes 12]

FOLDER receives ``model/`` (a stock transformers checkpoint in bf16) and ``training.json`` (what was measured). It learns from
``calibration.txt`` of the text folder and is measured on its ``heldout.txt``, of which it has seen nothing. Without ``--text``
it learns from the demo's text and writes both files to ``FOLDER/text``. Benches are given ``FOLDER/model`` and the text folder.

One thread and a fixed seed: the same machine trains the same model again, unless it runs out of its minutes and leaves steps
out. Experts are 64 wide, so weights can be quantized in groups of 32 and 64, and by whole rows.

Shapes: L blocks, E experts, N windows, S tokens in a window, T tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from examples.demo.language import pack, perplexity, train_tokenizer, unigram_perplexity, windows
from examples.demo.text import documents, split
from examples.demo.train_model import Settings, begin_passing_on_, fit, save, shape

_MEASURED = 256
"""Windows of the held-out text that are measured, spread evenly over it."""


@dataclass(frozen=True, slots=True)
class Paced(Settings):
    """Settings whose steps hang on the clock only when the machine falls behind."""

    grace: float = 0.1
    """Share of the seconds that is not counted: one slow step must not change what is trained."""

    def used(self, step: int, seconds: float) -> float:
        """Return the share of the training that is over."""
        late = (seconds / self.seconds - self.grace) / (1 - self.grace)
        return max(step / self.steps, late)


SETTINGS = Paced(
    vocabulary=2048, width=128, expert_width=64, blocks=8, experts=32, experts_used=4, sequence=256, batch=2, balance=0.1,
    steps=1600,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Usage:
    """How unevenly the experts of one block are used."""

    least: float
    """Tokens of its least used expert, over those of an expert if all were used alike."""
    most: float
    variation: float
    """Standard deviation of the tokens per expert over their mean: 0 if all are used alike."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the saved checkpoint."""

    text: str
    steps: int
    train_seconds: float
    train_tokens: int
    heldout_tokens: int
    unigram_perplexity: float
    perplexity: float
    usage: tuple[Usage, ...]


def main() -> None:
    """Train, measure and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, help="folder with calibration.txt and heldout.txt; by default the demo's text")
    parser.add_argument("--minutes", type=float, default=12.0, help="steps that would come later are left out")
    given = parser.parse_args()
    if given.folder is None:
        print("NOT MEASURED: name the folder for the model")
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    given.folder.mkdir(parents=True, exist_ok=True)
    text = given.text or write_demo_text(given.folder / "text", SETTINGS)
    settings = Paced(**asdict(SETTINGS) | {"seconds": 60 * given.minutes})
    measured = train(given.folder / "model", text, settings)
    (given.folder / "training.json").write_text(json.dumps(asdict(measured), indent=2) + "\n", encoding="utf-8")
    print(f"held-out perplexity {measured.perplexity:.2f}, a unigram model's {measured.unigram_perplexity:.1f}")
    print(f"{measured.steps} of {settings.steps} steps in {measured.train_seconds:.0f} s")
    for block, usage in enumerate(measured.usage):
        shares = f"{usage.least:.2f} to {usage.most:.2f} of an even share"
        print(f"block {block}: an expert gets {shares}, varying by {usage.variation:.2f}")


def write_demo_text(folder: Path, settings: Settings) -> Path:
    """Write the demo's text as the two files that benches read; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(documents(), heldout_share=settings.heldout_share, seed=settings.seed)
    for name, part in zip(("calibration.txt", "heldout.txt"), parts, strict=True):
        (folder / name).write_text("\n\n".join(document.text for document in part), encoding="utf-8")
    return folder


def train(folder: Path, text: Path, settings: Settings) -> Measured:
    """Train on the calibration text, save, and measure what was saved on the held-out text."""
    learned, heldout = ((text / name).read_text(encoding="utf-8") for name in ("calibration.txt", "heldout.txt"))
    tokenizer = train_tokenizer([learned], settings.vocabulary)
    train_T = pack(tokenizer, [learned])
    model = new_model(settings, tokenizer)
    started = time.monotonic()
    steps = fit(model, train_T, settings, Console(), loss_of=loss_balanced_by_block)
    seconds = time.monotonic() - started
    save(model, tokenizer, folder)
    # The checkpoint is judged as it lies on disk, with its weights rounded to bf16.
    saved = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    heldout_NS = evenly(windows(pack(tokenizer, [heldout]), settings.sequence), _MEASURED)
    return Measured(
        text=text.name,
        steps=steps,
        train_seconds=round(seconds, 1),
        train_tokens=len(train_T),
        heldout_tokens=heldout_NS.numel(),
        unigram_perplexity=unigram_perplexity(train_T, heldout_NS, settings.vocabulary),
        perplexity=perplexity(saved, heldout_NS),
        usage=tuple(usage_of(tokens_E) for tokens_E in tokens_per_expert(saved, heldout_NS)),
    )


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return an untrained model of the stock class, whose blocks begin by passing their input on (as the demo's do)."""
    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        intermediate_size=settings.experts_used * settings.expert_width,
        moe_intermediate_size=settings.expert_width,
        head_dim=settings.width // settings.heads,
        num_experts=settings.experts,
        norm_topk_prob=True,
        **shape(settings, tokenizer),
    )
    model = Qwen3MoeForCausalLM(config)
    begin_passing_on_(model.model.layers)
    return model


def loss_balanced_by_block(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """Return the next token's loss with the stock balance term, taken block by block.

    The stock class balances all blocks together: expert 3 of one block makes up for expert 3 of another. So trained, an eighth
    of this model's experts got less than a tenth of an even share.
    """
    output = model(input_ids=ids_NS, use_cache=False, output_router_logits=True)
    config, logits_NSV = model.config, output.logits[:, :-1]
    uneven = [
        load_balancing_loss_func((logits_TE,), config.num_experts, config.num_experts_per_tok)
        for logits_TE in output.router_logits
    ]
    loss = cross_entropy(logits_NSV.flatten(0, 1), ids_NS[:, 1:].flatten())
    return loss + config.router_aux_loss_coef * torch.stack(uneven).mean()


def evenly(windows_NS: Tensor, count: int) -> Tensor:
    """Return at most ``count`` windows, as far from one another as can be."""
    return windows_NS[:: -(-len(windows_NS) // count)]


@torch.no_grad()
def tokens_per_expert(model: Qwen3MoeForCausalLM, ids_NS: Tensor, *, batch: int = 16) -> Tensor:
    """Return how many tokens each block sends to each of its experts, [L, E]."""
    config = model.config
    counts_LE = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.long)
    for part_NS in ids_NS.split(batch):
        logits = model(input_ids=part_NS, use_cache=False, output_router_logits=True).router_logits
        for counts_E, logits_TE in zip(counts_LE, logits, strict=True):
            chosen_TK = logits_TE.topk(config.num_experts_per_tok, dim=-1).indices
            counts_E += torch.bincount(chosen_TK.flatten(), minlength=config.num_experts)
    return counts_LE


def usage_of(tokens_E: Tensor) -> Usage:
    """Return how unevenly tokens are spread over experts."""
    share_E = tokens_E.double() / tokens_E.double().mean()
    return Usage(least=share_E.min().item(), most=share_E.max().item(), variation=share_E.std(correction=0).item())


if __name__ == "__main__":
    main()
