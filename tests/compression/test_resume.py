"""A run that is interrupted and goes on leaves the bytes of one that never was; what it depends on is in its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.errors import Stopped
from compression.pipeline import compress
from compression.progress import BlockDone, Silent, StageStarted
from compression.resume import FinishedBlocks, fingerprint_of
from compression.shelf import FolderShelf
from compression.trimming import Cuts
from tests.compression.test_pipeline import GPTQ, TRIMS, a_request

DROP = TRIMS["expert_drop"]
RECIPES = {
    "gptq": [GPTQ],
    "gptq, attention too": [{**GPTQ, "attention": "W8A16"}],
    "gptq on the model's own activations": [{**GPTQ, "propagate_error": False}],
    "awq": [{**GPTQ, "method": "awq"}],
    "sparsegpt": [{"step": "prune", "method": "sparsegpt", "sparsity": 0.5}],
    "drop, then gptq": [*DROP, GPTQ],
    "rounding alone": [{**GPTQ, "method": "rtn"}],
    "merge": [{"step": "expert_merge", "experts_kept": 4}],
}


class StopsAfter(Silent):
    """Lets so many blocks of the compressing stage be finished."""

    def __init__(self, blocks: int) -> None:
        self.left, self.stage = blocks, ""

    def on_event(self, event) -> None:
        match event:
            case StageStarted(stage):
                self.stage = stage
            case BlockDone(stage="compressing"):
                self.left -= 1

    def should_stop(self) -> bool:
        return self.stage == "compressing" and self.left <= 0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def interrupted(request, folder: Path, tmp_path: Path, after: int) -> FolderShelf:
    """Run until so many blocks are finished; return the shelf that has them."""
    shelf = FolderShelf(tmp_path / "shelf")
    with pytest.raises(Stopped):
        compress(request, folder, tmp_path / "first", StopsAfter(after), shelf=shelf)
    return shelf


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_interrupted_after_any_block_ends_with_the_same_bytes(tiny_model_factory, tmp_path, recipe):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", num_hidden_layers=3)
    request = a_request(folder, RECIPES[recipe])
    compress(request, folder, tmp_path / "whole")

    for after in (1, 2) if recipe == "gptq" else (2,):
        shelf = interrupted(request, folder, tmp_path / str(after), after)
        report = compress(request, folder, tmp_path / str(after) / "out", shelf=shelf)

        assert [(note.blocks, note.same) for note in report.resumed] == [(tuple(range(after)), True)]
        assert hashes(tmp_path / str(after) / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_so_it_is_with_experts_in_one_tensor_groups_and_several_kinds_of_attention(tiny_model_factory, tmp_path, model_type):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    request = a_request(folder, DROP if model_type == "gpt_oss" else [GPTQ])
    compress(request, folder, tmp_path / "whole")

    shelf = interrupted(request, folder, tmp_path, 1)
    report = compress(request, folder, tmp_path / "out", shelf=shelf)

    assert report.resumed
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_finished_block_is_never_solved_again(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", num_hidden_layers=3)
    request = a_request(folder, [GPTQ])
    shelf = interrupted(request, folder, tmp_path, 2)
    (place,) = (tmp_path / "shelf").glob("*/block-00001")
    record = json.loads((place / "record.json").read_text())
    record["ledger"][0]["damping"] = 0.125
    (place / "record.json").write_text(json.dumps(record))

    report = compress(request, folder, tmp_path / "out", shelf=shelf)

    assert 0.125 in [row.damping for row in report.ledger]
    assert len(report.ledger) == 3 * 8 * 3


def test_blocks_beyond_a_gap_are_made_again(tmp_path):
    shelf = FolderShelf(tmp_path)
    shard = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, shard)
    blocks = FinishedBlocks(shelf, "f", {"device": "here"})
    for index in (0, 1, 3):
        blocks.keep(index, shard, [])

    found = FinishedBlocks(shelf, "f", {"device": "elsewhere"})

    assert list(found.taken) == [0, 1]
    assert [(note.blocks, note.same, note.environment) for note in found.notes()] == [((0, 1), False, {"device": "here"})]
    assert FinishedBlocks(shelf, "g", {}).taken == {}


def test_an_artifact_of_two_environments_says_so_and_is_verified_all_the_same(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", num_hidden_layers=3)
    request = a_request(folder, [GPTQ])
    shelf = interrupted(request, folder, tmp_path, 1)
    for path in (tmp_path / "shelf").glob("*/*/record.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"environment": record["environment"] | {"device": "another card"}}))

    report = compress(request, folder, tmp_path / "out", shelf=shelf)

    assert "another card" in next(w["message"] for w in report.warnings if w["code"] == "mixed_environments")
    assert [note.same for note in report.resumed] == [False]
    assert report.verification.largest_logit_difference == 0.0


def test_another_model_text_or_recipe_finds_nothing(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", num_hidden_layers=3)
    shelf = interrupted(a_request(folder, [GPTQ]), folder, tmp_path, 2)
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (weights,) = changed.glob("*.safetensors")
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if name.endswith("experts.0.w1.weight"))[0, 0] += 1.0
    save_file(tensors, weights, {"format": "pt"})
    seed = {
        "source": {"inline": ["the expert the router chose was not the other one " * 40]},
        "samples": 8,
        "sequence_length": 32,
    }

    others = [(a_request(changed, [GPTQ]), changed), (a_request(folder, [{**GPTQ, "group_size": 64}]), folder)]
    others.append((a_request(folder, [GPTQ], calibration=seed), folder))
    reports = [compress(request, model, tmp_path / f"out{i}", shelf=shelf) for i, (request, model) in enumerate(others)]

    assert [report.resumed for report in reports] == [(), (), ()]


def test_everything_that_blocks_depend_on_changes_the_fingerprint():
    cuts = Cuts((0, 1), {0: (0, 1), 1: (0, 2)})
    base = {"content": "c", "calibration": "t", "config": {"a": 1}, "steps": [{"step": "x"}], "cuts": cuts, "zero_width": None}
    changes = {
        "content": "d", "calibration": None, "config": {"a": 2}, "steps": [], "zero_width": 32,
        "cuts": Cuts((0, 1), {0: (0, 1), 1: (0, 1)}),
    }  # fmt: skip
    merged = Cuts((0, 1), {0: (0, 1), 1: (0, 2)}, merged={1: {0: (0, 1), 2: (2,)}})

    prints = [fingerprint_of(**base), *(fingerprint_of(**{**base, name: value}) for name, value in changes.items())]
    prints.append(fingerprint_of(**{**base, "cuts": merged}))

    assert len(set(prints)) == len(prints) == 8
    assert fingerprint_of(**base) == fingerprint_of(**{**base, "config": {"a": 1}})


def test_a_study_is_found_on_the_shelf_of_another_machine(tiny_model_factory, tmp_path):
    folder = tiny_model_factory("mixtral", dtype="bfloat16", num_hidden_layers=3)
    request = a_request(folder, DROP)
    shelf = FolderShelf(tmp_path / "shelf")
    first = compress(request, folder, tmp_path / "a", studies=tmp_path / "here", shelf=shelf)

    second = compress(request, folder, tmp_path / "b", studies=tmp_path / "there", shelf=shelf)

    assert (first.study.reused, second.study.reused) == (False, True)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
