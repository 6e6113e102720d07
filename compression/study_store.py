"""Studies on disk: ``study.safetensors`` holds every sum, ``study.json`` what can be read without torch; found again by content.

A study is worth keeping because it answers for every budget and, its domains being apart, for every mixture. It belongs to the
very weights and the very tokens that it was taken on. Both are known by hash, but to hash weights is to read them: files that
were seen before (same inode, size and times) are believed to be what they were, all others are read once.

    <folder>/<key>/<content>/study.{json,safetensors}   key: headers, calibration, versions; content: sha256 of the weights
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.checkpoint.reader import Reader
from compression.planner.prices import Prices
from compression.shelf import Files
from compression.study import ExpertStatistics, Likeness, Part, Sample, Study, Trials

_log = logging.getLogger(__name__)
ALGORITHM = 1
"""Raised by hand whenever a study of the same model would come out differently."""
_KEPT = 32
"""Studies kept in one folder; the longest unused go."""


class StudyStore:
    """A folder of studies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, reader: Reader, calibration_hash: str, parts: frozenset[Part], dtype: torch.dtype) -> Study | None:
        """Return a study of these weights and tokens that has these parts at least; None if there is none."""
        key = self.folder / _key(reader, calibration_hash, dtype)
        for entry in sorted(key.glob("*/study.json")):
            try:
                description = json.loads(entry.read_text(encoding="utf-8"))
                if parts <= set(description["parts"]) and self._is_of(reader, entry, description):
                    os.utime(entry)
                    return load(entry.parent)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                # Another job may have replaced or removed it, or a machine may have died: a study can always be taken anew.
                _log.warning("study not readable", extra={"study": str(entry), "error": str(error)})
        return None

    def keep(self, study: Study, reader: Reader, calibration_hash: str, dtype: torch.dtype) -> Path:
        """Store a study under the content that the reader has read; return its folder."""
        place = self.folder / _key(reader, calibration_hash, dtype) / reader.content()
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=self.folder, prefix="fresh-"))
        try:
            save(study, fresh, seen=[_stat(reader)])
            shutil.rmtree(place, ignore_errors=True)
            fresh.rename(place)
        except OSError:
            if not (place / "study.json").exists():
                raise
            # Another job has stored the same study in this very moment.
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self._forget()
        return place

    def key(self, reader: Reader, calibration_hash: str, dtype: torch.dtype) -> str:
        """Return the hash of what a study is looked for by, the weights themselves apart: to hash those is to read them."""
        return f"study-{_key(reader, calibration_hash, dtype)}"

    def adopt(self, key: str, content: str, files: Files) -> None:
        """Take in a study that was kept elsewhere, of the weights with this sha256; ``find`` compares it with those at hand."""
        place = self.folder / key.removeprefix("study-") / content
        if not place.exists():
            place.mkdir(parents=True)
            for name, path in files.items():
                shutil.copyfile(path, place / name)

    def _is_of(self, reader: Reader, entry: Path, description: dict[str, Any]) -> bool:
        stat = _stat(reader)
        if stat in description["seen"]:
            return True
        if reader.content() != entry.parent.name:
            return False
        description["seen"] = [*description["seen"][-15:], stat]
        _write(entry, description)
        return True

    def _forget(self) -> None:
        entries = sorted(self.folder.glob("*/*/study.json"), key=lambda entry: entry.stat().st_mtime)
        for entry in entries[:-_KEPT]:
            shutil.rmtree(entry.parent, ignore_errors=True)


def save(study: Study, folder: Path, *, seen: list[Any] | None = None) -> None:
    """Write a study into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in _tensors(study)}, folder / "study.safetensors")
    _write(folder / "study.json", {**describe(study), "seen": seen or []})


def load(folder: Path) -> Study:
    """Return the study in a folder."""
    description = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "study.safetensors")
    study = Study(
        domains=tuple(description["domains"]),
        parts=frozenset(description["parts"]),
        tokens_M=tensors["tokens_M"],
        span_MLL=tensors.get("span_MLL"),
        sampled_M=tensors.get("sampled_M"),
        seconds=description["seconds"],
        prices=Prices.model_validate(description["prices"]) if description.get("prices") else None,
    )
    inside: dict[str, dict[int, dict[str, Tensor]]] = {"cosine": {}, "experts": {}, "trials": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if rest:
            block, _, field = rest.partition("/")
            inside[kind].setdefault(int(block), {})[field] = tensor
    study.cosine_M = {block: found[""] for block, found in sorted(inside["cosine"].items())}
    study.experts = {block: _statistics(found) for block, found in sorted(inside["experts"].items())}
    for block, found in sorted(inside["trials"].items()):
        study.trials[block] = Trials(tuple(description["trial_settings"]), _below(found, "error"), _below(found, "energy"))
    return study


def describe(study: Study) -> dict[str, Any]:
    """Return what a planner reads, as plain data: every sum that has one number per block or per expert, domain by domain."""
    blocks: list[dict[str, Any]] = []
    for block, cosine_M in study.cosine_M.items():
        row: dict[str, Any] = {"index": block, "cosine": cosine_M.tolist()}
        if block in study.experts:
            row |= _numbers(study.experts[block])
        if block in study.trials:
            trials = study.trials[block]
            row["trials"] = {
                name: {"error": error.tolist(), "energy": trials.energy[name].tolist()} for name, error in trials.error.items()
            }
        blocks.append(row)
    return {
        "algorithm": ALGORITHM,
        "domains": list(study.domains),
        "parts": sorted(study.parts),
        "tokens": study.tokens_M.tolist(),
        "trial_settings": list(next(iter(study.trials.values())).settings) if study.trials else [],
        "seconds": study.seconds,
        "prices": study.prices.model_dump(mode="json") if study.prices is not None else None,
        "blocks": blocks,
    }


def _numbers(statistics: ExpertStatistics) -> dict[str, Any]:
    names = [entry.name for entry in fields(statistics) if entry.name.endswith(("_M", "_ME", "_E"))]
    numbers = {name.rsplit("_", 1)[0]: getattr(statistics, name).tolist() for name in names}
    return {**numbers, "parameters": statistics.parameters, "median_ratio": statistics.median_ratio()}


def _tensors(study: Study) -> Iterator[tuple[str, Tensor]]:
    yield "tokens_M", study.tokens_M
    if study.span_MLL is not None and study.sampled_M is not None:
        yield from (("span_MLL", study.span_MLL), ("sampled_M", study.sampled_M))
    yield from ((f"cosine/{block}/", cosine_M) for block, cosine_M in study.cosine_M.items())
    for kind, owners in (("experts", study.experts), ("trials", study.trials)):
        for block, owner in owners.items():
            yield from ((f"{kind}/{block}/{name}", tensor) for name, tensor in _flat(owner))


def _flat(owner: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a dataclass, and of those in it, by path."""
    items = owner.items() if isinstance(owner, dict) else [(e.name, getattr(owner, e.name)) for e in fields(owner)]  # type: ignore[arg-type]
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, int):
            yield name, torch.tensor(value)
        elif isinstance(value, dict) or is_dataclass(value):
            yield from ((f"{name}/{below}", tensor) for below, tensor in _flat(value))


def _statistics(found: dict[str, Tensor]) -> ExpertStatistics:
    own: dict[str, Any] = {name: tensor for name, tensor in found.items() if "/" not in name}
    own["parameters"] = int(own["parameters"])
    if sample := _below(found, "sample"):
        router = _below(sample, "router")
        own["sample"] = Sample(**{name: tensor for name, tensor in sample.items() if "/" not in name}, router=router)
    if likeness := _below(found, "likeness"):
        own["likeness"] = Likeness(**likeness)
    return ExpertStatistics(**own)


def _below(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in found.items() if name.startswith(f"{prefix}/")}


def _key(reader: Reader, calibration_hash: str, dtype: torch.dtype) -> str:
    headers = sorted((header.name, header.dtype, list(header.shape)) for header in reader.checkpoint.tensors.values())
    about = [ALGORITHM, reader.config, headers, calibration_hash, str(dtype), torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _stat(reader: Reader) -> list[list[Any]]:
    files = sorted({header.file for header in reader.checkpoint.tensors.values()})
    stats = [(file, (reader.folder / file).stat()) for file in files]
    return [[file, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]


def _write(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps(content), encoding="utf-8")
    fresh.replace(path)
