"""Task files for lm-evaluation-harness, whose questions lie in a file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def a_task(name: str, data: Path, *, version: float, **settings: Any) -> str:
    """Return a task file; each question stands in ``q``."""
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    return yaml.safe_dump({**task, "doc_to_text": "{{q}}", "metadata": {"version": version}, **settings})


def a_choice(name: str, data: Path, *, version: float) -> str:
    """Return a multiple choice among ``choices``; the place of the right one is ``label``."""
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label", "metric_list": metrics}
    return a_task(name, data, version=version, **choice)
