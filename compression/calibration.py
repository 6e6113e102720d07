"""Text to token batches: seeded, counted, and named by a hash of their content.

Documents are tokenised without added special tokens, joined with the tokenizer's end-of-text token between them,
and cut into windows of one sequence length. ``samples`` windows are drawn without replacement by a seeded
generator. A long source is read only until it has given READ_AHEAD times the tokens needed, so the draw is from
that beginning, and the description says so. A mixture shares the samples out by weight (largest remainder) and
keeps its domains apart. Fewer windows than asked for are all used, with a warning in the description.

Evaluation text is never calibration text: see ``refuse_overlap``.

Shapes: N samples, S tokens per sample, M = S - RUN + 1 runs per sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compression.errors import BrokenCheckpoint, RemoteCodeRequired, ValidationFailed
from compression.request import Calibration, Domain, InlineText, Perplexity
from compression.text.documents import Purpose, describe_source, read_documents

READ_AHEAD = 4
"""A source is read until it has given this many times the tokens that are needed."""
RUN = 32
"""Tokens: text that two sets share counts as shared from this length on."""
SHARED_ALLOWED = 0.05
"""Share of the evaluation tokens that may lie in shared runs: licence headers and other set phrases recur anywhere."""

SPARE = 64
"""Windows beyond the samples that are kept at hand, at most."""

_EVALUATION_SEED = 0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Samples of tokens, and where they came from."""

    ids_NS: Tensor
    spare_NS: Tensor
    """More windows of the same text, none of them a sample: what plans are priced and tried on. SPARE, if so many are left."""
    domains: tuple[str, ...]
    domain_N: Tensor
    """Index into ``domains`` of each sample."""
    content_hash: str
    """sha256 of the tokens and of their grouping into domains, whatever settings or files they came from."""
    tokens: int
    description: dict[str, Any]
    """For the report: plain data; ``warnings`` lists what the reader should know."""
    text_tokens: dict[bytes, int] = field(repr=False)
    """Digest of every piece of text read -> its tokens; what ``refuse_overlap`` compares."""


def load_calibration(settings: Calibration, tokenizer_folder: Path) -> TokenSet:
    """Return the tokens that statistics are taken on."""
    wanted = _Wanted(settings.samples, settings.sequence_length, settings.seed)
    return _load(_parts(settings.source, "calibration", "/calibration/source"), wanted, tokenizer_folder)


def load_evaluation(settings: Perplexity, tokenizer_folder: Path, *, sequence_length: int) -> TokenSet:
    """Return the held-out tokens; ``sequence_length`` holds where the settings name none."""
    wanted = _Wanted(settings.samples, settings.sequence_length or sequence_length, _EVALUATION_SEED)
    return _load(_parts(settings.source, "evaluation", "/evaluation/perplexity/source"), wanted, tokenizer_folder)


def refuse_overlap(calibration: TokenSet, evaluation: TokenSet) -> float:
    """Return the share of evaluation tokens that also stand in the calibration samples; refuse more than a trace.

    Refused are: an evaluation sample that stands in the calibration samples as a whole; more than SHARED_ALLOWED of
    all evaluation tokens in runs of RUN tokens that both sets hold; the same texts, making up more than
    SHARED_ALLOWED of what was read for evaluation, even where the samples drawn from them differ. Samples shorter
    than RUN are compared by text alone: a few words recur everywhere.
    """
    shared_NS = _shared_tokens(calibration.ids_NS, evaluation.ids_NS)
    share = shared_NS.double().mean().item()
    same_text = sum(tokens for digest, tokens in evaluation.text_tokens.items() if digest in calibration.text_tokens)
    same_text_share = same_text / sum(evaluation.text_tokens.values())
    whole = int(shared_NS.all(dim=1).sum())
    if whole or max(share, same_text_share) > SHARED_ALLOWED:
        raise ValidationFailed(
            f"evaluation text is calibration text: of {evaluation.description['source']!r}, {same_text_share:.1%} is the "
            f"same text as in {calibration.description['source']!r}, {share:.1%} of the sampled tokens recur in its samples, "
            f"{whole} samples as a whole; name another text for one of them",
            pointer="/evaluation/perplexity/source",
        )
    return share


@dataclass(frozen=True)
class _Wanted:
    samples: int
    sequence_length: int
    seed: int


@dataclass(frozen=True)
class _Part:
    source: str | InlineText
    purpose: Purpose
    pointer: str
    weight: float = 1.0
    given_name: str | None = None

    @classmethod
    def of(cls, domain: Domain, purpose: Purpose, pointer: str, index: int) -> _Part:
        pointer = f"{pointer}/{index}"
        if not math.isfinite(domain.weight):
            raise ValidationFailed(f"weight {domain.weight} is not a finite number", pointer=f"{pointer}/weight")
        name = f"inline {index}" if domain.name is None and isinstance(domain.source, InlineText) else domain.name
        return cls(domain.source, purpose, f"{pointer}/source", weight=domain.weight, given_name=name)

    @property
    def label(self) -> str:
        return describe_source(self.source, self.purpose)

    @property
    def name(self) -> str:
        return self.given_name or self.label


@dataclass
class _Reading:
    ids: Tensor
    text_tokens: dict[bytes, int]
    documents: int
    to_the_end: bool


def _parts(source: str | InlineText | tuple[Domain, ...], purpose: Purpose, pointer: str) -> list[_Part]:
    if not isinstance(source, tuple):
        return [_Part(source, purpose, pointer)]
    parts = [_Part.of(domain, purpose, pointer, index) for index, domain in enumerate(source)]
    _refuse_doubles(parts)
    return parts


def _refuse_doubles(parts: Sequence[_Part]) -> None:
    for index, part in enumerate(parts):
        if any(part.source == other.source for other in parts[:index]):
            raise ValidationFailed(f"{part.label} is in the mixture twice; give it once, with more weight", pointer=part.pointer)
        if any(part.name == other.name for other in parts[:index]):
            raise ValidationFailed(f"two domains are named {part.name!r}", pointer=part.pointer.removesuffix("/source") + "/name")


def _load(parts: Sequence[_Part], wanted: _Wanted, tokenizer_folder: Path) -> TokenSet:
    tokenizer = _load_tokenizer(tokenizer_folder)
    generator = torch.Generator().manual_seed(wanted.seed)
    asked = _shared_out(wanted.samples, [part.weight for part in parts])
    readings = [_read(part, count, wanted, tokenizer) for part, count in zip(parts, asked, strict=True)]
    windows = [_shuffled(reading.ids, wanted, generator) for reading in readings]
    drawn = [ids_WS[:count] for ids_WS, count in zip(windows, asked, strict=True)]
    spare = zip(windows, asked, _shared_out(SPARE, [part.weight for part in parts]), strict=True)
    counts = [len(ids_NS) for ids_NS in drawn]
    if not sum(counts):
        _refuse_too_short(parts, readings, wanted)
    ids_NS, domain_N = torch.cat(drawn), torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts))
    domains = [_describe_domain(*row, wanted) for row in zip(parts, asked, counts, readings, strict=True)]
    return TokenSet(
        ids_NS=ids_NS,
        spare_NS=torch.cat([ids_WS[count : count + more] for ids_WS, count, more in spare]),
        domains=tuple(part.name for part in parts),
        domain_N=domain_N,
        content_hash=_content_hash(ids_NS, domain_N),
        tokens=ids_NS.numel(),
        description=_describe(parts, wanted, domains),
        text_tokens={digest: tokens for reading in readings for digest, tokens in reading.text_tokens.items()},
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without any of these files transformers may hand out an empty tokenizer of the model's family, and no error.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BrokenCheckpoint(f"{folder} holds no tokenizer; one of {', '.join(_TOKENIZER_FILES)} is needed")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise RemoteCodeRequired(f"the tokenizer in {folder} asks for code of its own; none is ever run") from error
        raise BrokenCheckpoint(f"the tokenizer in {folder} does not open: {str(error)[:500]}") from error


def _shared_out(samples: int, weights: Sequence[float]) -> list[int]:
    """Split by largest remainder; ties go to the earlier domain."""
    largest = max(weights)
    total = sum(weight / largest for weight in weights)
    quotas = [samples * (weight / largest) / total for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return counts


def _read(part: _Part, samples: int, wanted: _Wanted, tokenizer: PreTrainedTokenizerBase) -> _Reading:
    enough = READ_AHEAD * samples * wanted.sequence_length
    reading = _Reading(torch.empty(0, dtype=torch.int64), {}, documents=0, to_the_end=False)
    chunks, have = [], 0
    for ids, digest, begins in _tokenised(part, tokenizer) if samples else ():
        if have >= enough:
            break
        chunks.append(torch.tensor(ids, dtype=torch.int64))
        have += len(ids)
        reading.text_tokens[digest] = reading.text_tokens.get(digest, 0) + len(ids)
        reading.documents += begins
    else:
        reading.to_the_end = samples > 0
    reading.ids = torch.cat([reading.ids, *chunks])
    return reading


def _tokenised(part: _Part, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bytes, bool]]:
    end: Any = tokenizer.eos_token_id
    before, begins = list[int](), True
    for piece in read_documents(part.source, part.purpose, pointer=part.pointer):
        # verbose=False: a document longer than the model's context is no mistake here, it is cut below.
        ids = tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids
        yield before + ids, hashlib.sha256(piece.text.encode()).digest(), begins
        begins = piece.last
        before = [end] if piece.last and end is not None else []


def _shuffled(ids: Tensor, wanted: _Wanted, generator: torch.Generator) -> Tensor:
    windows = len(ids) // wanted.sequence_length
    ids_WS = ids[: windows * wanted.sequence_length].view(windows, wanted.sequence_length)
    return ids_WS[torch.randperm(windows, generator=generator)]


def _refuse_too_short(parts: Sequence[_Part], readings: Sequence[_Reading], wanted: _Wanted) -> None:
    tokens, documents = sum(len(reading.ids) for reading in readings), sum(reading.documents for reading in readings)
    raise ValidationFailed(
        f"{' + '.join(part.label for part in parts)} gives {tokens} tokens in {documents} documents; "
        f"one sample needs {wanted.sequence_length}: give more text or a shorter sequence_length",
        pointer=parts[0].pointer,
    )


def _content_hash(ids_NS: Tensor, domain_N: Tensor) -> str:
    content = hashlib.sha256(f"slimtrim tokens {tuple(ids_NS.shape)}\n".encode())
    content.update(ids_NS.numpy().astype("<i8").tobytes())
    content.update(domain_N.numpy().astype("<i8").tobytes())
    return content.hexdigest()


def _describe_domain(part: _Part, asked: int, samples: int, reading: _Reading, wanted: _Wanted) -> dict[str, Any]:
    return {
        "name": part.name,
        "source": part.label,
        "weight": part.weight,
        "samples_asked": asked,
        "samples": samples,
        "documents": reading.documents,
        "tokens_read": len(reading.ids),
        "read_to_the_end": reading.to_the_end,
    }


def _describe(parts: Sequence[_Part], wanted: _Wanted, domains: list[dict[str, Any]]) -> dict[str, Any]:
    samples = sum(domain["samples"] for domain in domains)
    return {
        "source": " + ".join(part.label for part in parts),
        "default": any(part.source == "default" for part in parts),
        "samples_asked": wanted.samples,
        "samples": samples,
        "sequence_length": wanted.sequence_length,
        "tokens": samples * wanted.sequence_length,
        "seed": wanted.seed,
        "documents": sum(domain["documents"] for domain in domains),
        "domains": domains,
        "warnings": [warning for domain in domains for warning in _warnings(domain)],
    }


def _warnings(domain: dict[str, Any]) -> Iterator[str]:
    if domain["samples"] < domain["samples_asked"]:
        yield f"{domain['name']} gives only {domain['samples']} of the {domain['samples_asked']} samples asked for"
    if not domain["samples_asked"]:
        yield f"{domain['name']} has too small a weight for one sample, and none was taken"


def _shared_tokens(calibration_NS: Tensor, evaluation_NS: Tensor) -> Tensor:
    """Mark the evaluation tokens that lie in a run of RUN tokens found in the calibration samples."""
    shared_NS = torch.zeros_like(evaluation_NS, dtype=torch.bool)
    if min(calibration_NS.shape[1], evaluation_NS.shape[1]) < RUN:
        return shared_NS
    found_NM = torch.isin(_run_hashes(evaluation_NS), _run_hashes(calibration_NS)) & _says_something(evaluation_NS)
    for offset in range(RUN):
        shared_NS[:, offset : offset + found_NM.shape[1]] |= found_NM
    return shared_NS


def _run_hashes(ids_NS: Tensor) -> Tensor:
    """Hash every run of RUN tokens: a sum with odd 62-bit factors modulo 2^64, so that unequal runs rarely collide."""
    factors = torch.randint(2**62, (RUN,), generator=torch.Generator().manual_seed(RUN)) | 1
    runs = ids_NS.shape[1] - RUN + 1
    hashes_NM = torch.zeros(len(ids_NS), runs, dtype=torch.int64)
    for offset, factor in enumerate(factors):
        hashes_NM += (ids_NS[:, offset : offset + runs] + 1) * factor
    return hashes_NM


def _says_something(ids_NS: Tensor) -> Tensor:
    """Mark the runs that are not rulers, blank space or another short pattern drawn out."""
    changes_NS = torch.nn.functional.pad(ids_NS[:, 1:] != ids_NS[:, :-1], (1, 0)).cumsum(dim=1)
    return changes_NS[:, RUN - 1 :] - changes_NS[:, : ids_NS.shape[1] - RUN + 1] >= RUN // 4
