"""One whole run on a tiny model, evaluated in every way there is, and a folder of own benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from compression.pipeline import compress
from compression.progress import Event
from compression.report import Report
from compression.request import Compression
from tests import tiny_models
from tests.compression.evaluation.made_tasks import a_choice, a_task
from tests.compression.heard import Heard

TEXT = "the expert the router chose was not the one that the other tokens had wanted so they went home"
WORDS = TEXT.split()
TRIM = {"step": "expert_drop", "criterion": "reap", "experts_kept": 6}
QUANTIZE = {"step": "quantize", "method": "rtn", "scheme": "W4A16", "group_size": 32}
KINDS = [
    {"source": {"inline": [" ".join(reversed(WORDS)) * 8]}, "name": "turned"},
    {"source": {"inline": ["She sells sea shells on the sea shore, and 1969 was a good year for them. " * 8]}, "name": "tale"},
]

WRITING = {
    "output_type": "generate_until",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["the"], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


class Evaluated(NamedTuple):
    """What a run left."""

    original: Path
    artifact: Path
    report: Report
    events: list[Event]


def a_request(folder: Path, steps: list[dict[str, Any]], **evaluation: Any) -> Compression:
    return Compression.model_validate(
        {
            "model": folder.as_uri(),
            "recipe": {"steps": steps},
            "calibration": {"source": {"inline": [" ".join(WORDS) * 20]}, "samples": 8, "sequence_length": 32},
            "evaluation": {"perplexity": {"source": KINDS, "samples": 8}, **evaluation},
        }
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("mixtral", tmp_path_factory.mktemp("tiny"), dtype="float32")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple choice of two, three and four answers, and a task of writing."""
    folder = tmp_path_factory.mktemp("tasks")
    data = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    rows = (
        {"q": " ".join(WORDS[i % 7 : i % 7 + 4]), "choices": WORDS[i % 5 : i % 5 + 2 + i % 3], "label": i % 2, "answer": "home"}
        for i in range(9)
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(a_choice("tiny_choice", data, version=1.5))
    (folder / "write.yaml").write_text(a_task("tiny_write", data, version=2, **WRITING))
    return folder


@pytest.fixture(scope="session")
def evaluated(tiny: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    request = a_request(
        tiny,
        [TRIM, QUANTIZE],
        baselines=True,
        benchmarks=["tiny_choice", "tiny_write"],
        benchmark_limit=6,
        batch_size=4,
        generation={"source": [{"prompt": "The quick brown", "expected": "fox"}, "A", " ".join(WORDS)], "new_tokens": 8},
        speed={"batch_sizes": [2], "context_tokens": 16, "new_tokens": 3, "rounds": 2},
    )
    out, listener = tmp_path_factory.mktemp("out"), Heard()
    report = compress(request, tiny, out, listener, tasks=tasks)
    return Evaluated(tiny, out, report, listener.events)
