"""Prices that were measured before, found again without reading a weight: how ``POST /v1/plans`` answers from a study.

The studies themselves are kept by the content of weights and tokens (``study_store.py``), which only a worker reads. Beside
them lies a copy of the prices under what a request says: model, revision, headers and calibration settings. A folder whose
weights change under the same name is therefore planned from old prices; its job measures anew.

    <folder>/known/<sha256>.json
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from compression.checkpoint.headers import Checkpoint
from compression.planner.prices import Prices
from compression.request import Compression


def remember(folder: Path, request: Compression, checkpoint: Checkpoint, prices: Prices) -> Path:
    """Keep prices for requests like this one; return the file that holds them."""
    path = _path(folder, request, request.revision, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".fresh")
    fresh.write_text(prices.model_dump_json(), encoding="utf-8")
    return fresh.replace(path)


def recall(folder: Path, request: Compression, revision: str | None, checkpoint: Checkpoint) -> Prices | None:
    """Return the prices kept for such a request of that revision; None where there are none that can be read."""
    try:
        return Prices.model_validate_json(_path(folder, request, revision or request.revision, checkpoint).read_bytes())
    except (OSError, ValidationError):
        return None


def _path(folder: Path, request: Compression, revision: str, checkpoint: Checkpoint) -> Path:
    headers = sorted((header.name, header.dtype, list(header.shape)) for header in checkpoint.tensors.values())
    about = [request.model, revision, checkpoint.config, headers, request.calibration.model_dump(mode="json")]
    return folder / "known" / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}.json"
